"""ops.divergence against autograd over all logits, its limits, its memory and its refusals.

TRL's GKD loss is the same to rounding (benchmarks/rlhf/divergence_against_trl.py; importing TRL
takes longer than all of this)."""

import pytest
import torch
import torch.nn.functional as F
from memory import peak_extra_bytes

from llama2rt import ops
from llama2rt.ops import divergence_tiles

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def case(tokens=23, vocabulary=41, dtype=torch.float64, dims=(6, 9), scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype) * scale

    student, teacher = dims
    hidden, weight = random(tokens, student), random(vocabulary, student)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::4] = -1
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return *leaves, random(tokens, teacher), random(vocabulary, teacher), targets


def kl(p, q):
    """KL(p || q) of rows of log-probabilities, by torch."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def by_formula(hidden, weight, teacher_hidden, teacher_weight, targets, beta, temperature):
    """GKD, equation 1, over all logits at once."""
    s = F.log_softmax(hidden @ weight.T / temperature, -1)
    t = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, -1)
    if beta in (0, 1):
        value = kl(s, t) if beta else kl(t, s)
    else:
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        value = beta * kl(t, m) + (1 - beta) * kl(s, m)
    return torch.where(targets >= 0, value, 0.0)


def value_and_gradients(function, leaves, upstream):
    value = function()
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("beta", BETAS)
def test_equals_autograd_over_all_logits(beta, backend, monkeypatch):
    """With other gradients of every row, over tiles of three rows and one."""
    monkeypatch.setattr(divergence_tiles, "ELEMENTS", 3 * 41)
    given = case()
    upstream = torch.randn(23, dtype=torch.float64)
    for temperature in (1.0, 0.5, 3.0):
        settings = {"beta": beta, "temperature": temperature}
        with ops.use(backend):
            ours = value_and_gradients(
                lambda: ops.divergence(*given, **settings),  # noqa: B023
                given[:2],
                upstream,
            )
        theirs = value_and_gradients(
            lambda: by_formula(*given, **settings),  # noqa: B023
            given[:2],
            upstream,
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
        assert (ours[0] >= 0).all() and (ours[0][::4] == 0).all()
        assert (ours[1][::4] == 0).all()


@pytest.mark.parametrize("beta", (0.0, 0.5, 1.0))
def test_gradcheck(beta):
    hidden, weight, *rest = case(tokens=5, vocabulary=7)
    assert torch.autograd.gradcheck(
        lambda h, w: ops.divergence(h, w, *rest, beta=beta, temperature=1.7), (hidden, weight)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_inputs(dtype, tolerance):
    """Relative to the largest of each result; bf16 is computed as fp32 is, from rounded logits."""
    given = case(dtype=dtype, scale=0.5)
    wide = [x.detach().double() if x.is_floating_point() else x for x in given]
    leaves = wide[0].requires_grad_(), wide[1].requires_grad_()
    upstream = torch.ones(23)
    for beta in BETAS:
        settings = {"beta": beta, "temperature": 1.0}
        ours = value_and_gradients(
            lambda: ops.divergence(*given, **settings),  # noqa: B023
            given[:2],
            upstream,
        )
        exact = value_and_gradients(
            lambda: by_formula(*wide, **settings),  # noqa: B023
            leaves,
            upstream.double(),
        )
        for mine, other in zip(ours, exact, strict=True):
            assert float((mine - other).abs().max() / other.abs().max()) < tolerance
        assert ours[0].dtype == torch.float32 and ours[2].dtype == dtype


def test_certain_distributions_stay_finite():
    """Logits of 10,000: probabilities of 0 in fp32, on either side."""
    hidden, weight, teacher_hidden, teacher_weight, targets = case(dtype=torch.float32, scale=100.0)
    for beta in BETAS:
        value = ops.divergence(hidden, weight, teacher_hidden, teacher_weight, targets, beta=beta)
        gradients = torch.autograd.grad(value.sum(), (hidden, weight))
        assert all(torch.isfinite(x).all() for x in (value, *gradients))


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    hidden, weight, *_, targets = case(dtype=torch.float32)
    copies = hidden.detach().clone(), weight.detach().clone()
    for beta in BETAS:
        value = ops.divergence(hidden, weight, *copies, targets, beta=beta)
        gradients = torch.autograd.grad(value.sum(), (hidden, weight))
        assert value.abs().max() < 1e-6 and max(g.abs().max() for g in gradients) < 1e-5


def test_near_its_ends_the_mixture_learns_slowly():
    """beta KL(t || s) near 0, (1 - beta) KL(s || t) near 1: the limits are no KL, but shares."""
    given = [x.detach() for x in case(scale=0.5)]
    small = 1e-5
    forward, reverse = (ops.divergence(*given, beta=beta) for beta in (0.0, 1.0))
    near = [ops.divergence(*given, beta=beta) for beta in (small, 1 - small)]
    predicted = given[-1] >= 0
    for value, whole in zip(near, (forward, reverse), strict=True):
        share = value[predicted] / whole[predicted]
        torch.testing.assert_close(share, torch.full_like(share, small), rtol=0.01, atol=0)


def test_no_logits_of_all_tokens(monkeypatch):
    """Forward and backward, at a twelfth of the two [T, V] that the formula starts from."""
    tokens, vocabulary = 512, 4096
    monkeypatch.setattr(divergence_tiles, "ELEMENTS", 8 * vocabulary)
    given = case(tokens, vocabulary, torch.float32)
    hidden, weight = given[:2]

    def run():
        value = ops.divergence(*given, beta=0.5)
        return torch.autograd.grad(value.sum(), (hidden, weight))

    assert peak_extra_bytes(run) < 2 * tokens * vocabulary * 4 / 12


def test_opcheck():
    hidden, weight, teacher_hidden, teacher_weight, _ = case(dtype=torch.float32)
    teacher = teacher_hidden, teacher_weight
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.llama2rt.divergence.default,
        (hidden, weight, *teacher, 0.5, 1.0, "cpu"),
        test_utils=[*checks, "test_aot_dispatch_dynamic"],
    )
    row = torch.ones(23)
    torch.library.opcheck(
        torch.ops.llama2rt.divergence_backward.default,
        (row, hidden.detach(), weight.detach(), *teacher, row, 0.5, 1.0, "cpu"),
        test_utils=checks,
    )


def test_refusals():
    hidden, weight, teacher_hidden, teacher_weight, targets = case()
    cut = torch.Tensor._make_subclass(type("DTensor", (torch.Tensor,), {}), weight.detach())
    for change, said in {
        "fewer rows": ((hidden[:-1], weight, teacher_hidden, teacher_weight), "teacher_hidden"),
        "other vocabulary": ((hidden, weight, teacher_hidden, teacher_weight[:-1]), "teacher_w"),
        "other dtype": ((hidden, weight, teacher_hidden.float(), teacher_weight), "float64"),
        "cut": ((hidden, cut, teacher_hidden, teacher_weight), "whole vocabulary .* DTensor"),
        "a teacher that learns": (
            (hidden, weight, teacher_hidden.clone().requires_grad_(), teacher_weight),
            "a teacher without gradients",
        ),
    }.values():
        with pytest.raises(ValueError, match=said):
            ops.divergence(*change, targets[: len(change[0])])
    for settings in ({"beta": -0.1}, {"beta": 1.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
            ops.divergence(hidden, weight, teacher_hidden, teacher_weight, targets, **settings)
