"""token_logprob in Triton, interpreted, by the rule of `numerics.judge`, and its promises.

The yardstick and the inputs are in `logprob`.
"""

import math

import pytest
import torch
from logprob import both, check, same_bits, small

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt import ops
from llama2rt.kernels import token_logprob as kernels
from llama2rt.ops import reference

pytestmark = [
    pytest.mark.usefixtures("interpreted", "poisoned"),
    # Rows of a tile beyond the last token are computed like any other, and not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = {
    80: kernels.Launch(32, 128, 64, warps=4, stages=2, group=2),
    90: kernels.Launch(32, 128, 64, warps=4, stages=2, group=2, persistent=True, tma=True),
}


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def small_tiles(request, monkeypatch):
    """Several tiles, slices and parts in shapes that the interpreter can do."""
    for table in (kernels.FORWARD, kernels.BACKWARD):
        monkeypatch.setitem(table, 80, SMALL[request.param])
    monkeypatch.setattr(kernels, "SMALL", SMALL[80])
    monkeypatch.setattr(kernels, "SLICE", 160)
    monkeypatch.setattr(kernels, "PART", 1)


@pytest.mark.parametrize("kind", ["normal", "small", "tail", "offset"])
@pytest.mark.parametrize(
    ("tokens", "depth", "vocabulary"),
    # One tile; a depth TMA cannot read; slices of one, three and an odd number of tiles.
    [(13, 8, 3), (90, 33, 70), (41, 72, 330)],
)
def test_numerics(tokens, depth, vocabulary, kind, dtype, small_tiles, seed):
    check(kernels, tokens, depth, vocabulary, kind, dtype, 0.7, seed)


@pytest.mark.parametrize("architecture", [80, 90])
def test_shipped_settings(architecture, monkeypatch, seed):
    monkeypatch.setattr(kernels, "architecture", lambda x: architecture)
    check(kernels, 131, 72, 300, "normal", torch.bfloat16, 1.0, seed)


@pytest.mark.parametrize("strides", ["rows apart", "columns first", "one row", "one value"])
def test_any_strides(strides, dtype, small_tiles):
    def arranged(x):
        return {
            "rows apart": torch.cat((x, x), -1)[:, : x.shape[1]],
            "columns first": x.t().contiguous().t(),
            "one row": x[:1].expand_as(x),
            "one value": x[:1, :1].expand_as(x),
        }[strides]

    hidden, weight, targets = small(dtype)
    hidden, weight = arranged(hidden), arranged(weight)
    targets = torch.stack((targets, targets), 1)[:, 0]
    upstream = torch.tensor(0.3).expand(40)
    dense = [x.contiguous() for x in (hidden, weight, targets, upstream, upstream)]
    copies = [x.clone() for x in dense]
    ours = both(kernels, hidden, weight, targets, upstream, upstream)
    assert same_bits(ours, both(kernels, *dense))
    assert same_bits(dense, copies), "an input was changed"
    assert all(x.is_contiguous() for x in ours)


def test_offsets_beyond_32_bits(small_tiles, far):
    hidden, weight, targets = small(torch.bfloat16, tokens=5, vocabulary=6)
    upstream = torch.randn(2, 5)
    near = both(kernels, hidden, weight, targets, *upstream)
    assert same_bits(near, both(kernels, far(hidden), far(weight), targets, *upstream))


def test_without_entropy_the_rest_is_the_same(dtype, small_tiles):
    arguments = *small(dtype), 0.7
    logprob, _, lse = kernels.token_logprob(*arguments, True)
    plain = kernels.token_logprob(*arguments, False)
    assert same_bits((logprob, lse), (plain[0], plain[2]))
    hidden, weight, *rest = arguments
    exact = reference.token_logprob(hidden.double(), weight.double(), *rest, False)
    torch.testing.assert_close(lse.double(), exact[2], rtol=2e-6, atol=2e-6)


def test_one_token(dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    many, one = (kernels.token_logprob(hidden[:n], weight, targets[:n], 0.7, True) for n in (40, 1))
    assert same_bits([x[:1] for x in many], one)


def test_narrow_targets(dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    upstream = torch.randn(2, 40)
    first, second = (both(kernels, hidden, weight, t, *upstream) for t in (targets, targets.int()))
    assert same_bits(first, second)


def test_targets_below_zero_are_not_predicted(dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    targets[3:9] = -100
    upstream = torch.randn(2, 40)
    skipped = targets < 0
    logprob, entropy, _, dhidden, _ = both(kernels, hidden, weight, targets, *upstream)
    for values in (logprob, entropy, dhidden):
        assert not values[skipped].any() and values[~skipped].any()
    logprob, entropy, lse, *gradients = both(
        kernels, hidden, weight, torch.full_like(targets, -1), *upstream
    )
    assert not any(x.any() for x in (logprob, entropy, *gradients)) and lse.isfinite().all()


def test_a_target_outside_the_vocabulary_is_not_a_number(dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    targets[5] = 150
    logprob = kernels.token_logprob(hidden, weight, targets, 1.0, False)[0]
    assert logprob.isnan().nonzero().flatten().tolist() == [5]


def test_certain_targets_are_never_positive_and_lose_no_entropy(dtype, small_tiles):
    hidden, weight, _ = small(dtype, depth=64)
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    logprob, entropy, _ = kernels.token_logprob(hidden, weight, targets, 0.05, True)
    assert (logprob <= 0).all() and (logprob > -1e-3).float().mean() > 0.5
    assert (entropy >= 0).all()


def test_no_tokens(dtype):
    hidden, weight, targets = small(dtype, tokens=0)
    logprob, entropy, lse, dhidden, dweight = both(
        kernels, hidden, weight, targets, *torch.empty(2, 0)
    )
    assert logprob.shape == entropy.shape == lse.shape == (0,)
    assert dhidden.shape == (0, 24) and not dweight.any()


def test_weight_gradient_is_summed_in_fp32(small_tiles):
    """A row that contributes much, and many too little for a bf16 sum to notice each: it would
    lose 3 % (Liger #1323)."""
    hidden = torch.full((257, 4), 0.125, dtype=torch.bfloat16)
    hidden[0] = 1024
    weight, targets = torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(257, dtype=torch.int64)
    lse = torch.full((257,), math.log(8))
    _, dweight = kernels.token_logprob_backward(
        torch.ones(257), None, hidden, weight, targets, lse, None, 1.0
    )
    total = 1024 + 256 * 0.125
    assert dweight[0, 0].item() == pytest.approx(total * 7 / 8, rel=0.004)
    assert dweight[1, 0].item() == pytest.approx(-total / 8, rel=0.004)


def test_through_the_ops():
    hidden, weight, targets = small(torch.float32)
    results = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with ops.use(name):
            logprob, entropy = ops.token_logprob(*leaves, targets, temperature=1.3, entropy=True)
        gradients = torch.autograd.grad((logprob * entropy).sum(), leaves)
        results.append([x.double() for x in (logprob, entropy, *gradients)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
