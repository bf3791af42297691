"""Decoding and token_logprob on a CPU by the rule of `numerics.judge`, and what other projects got
wrong in them and in attention.

Yardsticks in the same dtype: SDPA per sequence; and, on logits of a GEMM in that dtype made fp32,
the chosen one less torch.logsumexp (as TRL's selective_log_softmax).
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from memory import peak_extra_bytes
from numerics import draw, judge
from torch import Tensor

from llama2rt import ops
from llama2rt.ops import composed, contract, logprob_tiles, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [1, 2, 0, 113, 203, 1, 60, 58, 57]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def test_attention_keeps_documents_apart():
    """A batch equals its documents one by one, whatever else is packed beside them."""
    cu, tokens = offsets(RAGGED), sum(RAGGED)
    q, k, v = torch.randn(3, tokens, 4, 16).unbind()
    together = ops.attention(q, k, v, cu)
    for start, end in itertools.pairwise(cu.tolist()):
        part = slice(start, end)
        alone = ops.attention(q[part], k[part], v[part], torch.tensor([0, end - start]))
        torch.testing.assert_close(together[part], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", None])
def test_causal_is_bottom_right_aligned(backend):
    q, k, v = torch.randn(3, 9, 2, 8).unbind()
    with ops.use(backend):
        whole = ops.attention(q, k, v, torch.tensor([0, 4, 9]))
        # The last two queries of each document against all its keys.
        rows = torch.tensor([2, 3, 7, 8])
        last = ops.attention(
            q[rows], k, v, torch.tensor([0, 2, 4]), cu_seqlens_k=torch.tensor([0, 4, 9])
        )
        torch.testing.assert_close(last, whole[rows])
        # More queries than keys: the first ones see nothing and give 0, with gradient 0.
        q.requires_grad_()
        few = ops.attention(
            q, k[:5], v[:5], torch.tensor([0, 4, 9]), cu_seqlens_k=torch.tensor([0, 0, 5])
        )
        assert torch.equal(few[:4], torch.zeros(4, 2, 8))
        few.sum().backward()
        assert torch.equal(q.grad[:4], torch.zeros(4, 2, 8)) and q.grad.isfinite().all()


def test_attention_at_large_scores():
    q = torch.full((3, 1, 4), 100.0)
    v = torch.randn(3, 1, 4)
    out = ops.attention(q, q, v, torch.tensor([0, 3]))
    torch.testing.assert_close(out[2], v.mean(0))


@pytest.mark.parametrize("backend", ["composed", "native"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
def test_decode_attention(heads, kv_heads, backend, dtype, seed):
    lengths = torch.tensor([1, 0, 17, 16, 40], dtype=torch.int32)
    page, dim = 16, 24
    caches = [draw((15, page, kv_heads, dim), dtype, "normal", seed + i) for i in (0, 1)]
    table = torch.randperm(15).view(5, 3).to(torch.int32)
    # What lies beyond a sequence's end must not be read: not even multiplied by zero.
    for row, length in enumerate(lengths.tolist()):
        for j in range(length, 48):
            for cache in caches:
                cache[table[row, j // page], j % page] = torch.nan
        table[row, -(-length // page) :] = 10**6
    q = draw((5, heads, dim), dtype, "normal", seed + 2)
    if backend == "composed":
        run = composed.decode_attention
    else:
        cpu = pytest.importorskip("llama2rt.ops.cpu")
        run = cpu.decode_attention
    ours = run(q, *caches, table, lengths, dim**-0.5)
    wide = [x.double() for x in (q, *caches)]
    exact = reference.decode_attention(*wide, table, lengths, dim**-0.5)
    theirs = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // page)].long()
        if length:
            k, v = (c[pages].flatten(0, 1)[:length] for c in caches)
            theirs[row] = F.scaled_dot_product_attention(
                q[row][:, None],
                *(x.transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for x in (k, v)),
            )[:, 0]
    judge("out", ours, exact, theirs)
    assert torch.equal(ours[1], torch.zeros(heads, dim, dtype=dtype))


def gather_minus_logsumexp(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    logits = F.linear(hidden, weight).float() / temperature
    chosen = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets >= 0, chosen - logits.logsumexp(-1), 0.0)


@pytest.mark.parametrize("backend", ["composed", "native"])
@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize(
    ("tokens", "dim", "vocabulary"), [(1, 8, 3), (70, 32, 500), (1100, 24, 1100), (2100, 8, 2100)]
)
def test_token_logprob(tokens, dim, vocabulary, kind, backend, dtype, seed):
    run = composed if backend == "composed" else pytest.importorskip("llama2rt.ops.cpu")
    temperature = 0.7
    hidden = draw((tokens, dim), dtype, kind, seed)
    weight = draw((vocabulary, dim), dtype, "normal", seed + 1) * 0.3
    targets = torch.randint(-1, vocabulary, (tokens,))
    targets[-1] = vocabulary - 1
    upstream = draw((tokens,), torch.float32, "normal", seed + 2)
    logprob, _, lse = run.token_logprob(hidden, weight, targets, temperature, False)
    wide = (hidden.double(), weight.double(), targets)
    exact, _, exact_lse = reference.token_logprob(*wide, temperature, False)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = gather_minus_logsumexp(*leaves, targets, temperature)
    judge("logprob", logprob, exact, theirs.detach())

    ours = run.token_logprob_backward(
        upstream, None, hidden, weight, targets, lse, None, temperature
    )
    expected = reference.token_logprob_backward(
        upstream.double(), None, *wide, exact_lse, None, temperature
    )
    yardstick = torch.autograd.grad(theirs, leaves, upstream)
    for name, *three in zip(("dhidden", "dweight"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)


@pytest.mark.parametrize("backend", ["reference", None])
def test_targets_below_zero_are_not_predicted(backend, dtype):
    hidden = torch.randn(6, 8).to(dtype).requires_grad_()
    weight = torch.randn(20, 8).to(dtype).requires_grad_()
    targets = torch.tensor([3, -1, 19, -100, 0, -1])
    with ops.use(backend):
        logprob, entropy = ops.token_logprob(hidden, weight, targets, entropy=True)
        (logprob + entropy).sum().backward()
    skipped = targets < 0
    for values in (logprob, entropy, hidden.grad):
        assert not values[skipped].any() and values[~skipped].any()
    assert logprob.dtype == entropy.dtype == torch.float32


def test_logprob_is_never_positive(dtype, seed):
    """Certain targets, where a target's logit rounded apart from the others would exceed their sum
    (verl #2656)."""
    hidden = draw((600, 64), dtype, "normal", seed) * 3
    weight = draw((4500, 64), dtype, "normal", seed + 1)
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    logprob = ops.token_logprob(hidden, weight, targets, temperature=0.25)
    assert (logprob <= 0).all() and (logprob > -1e-3).float().mean() > 0.5


def test_entropy_and_temperature_by_formula():
    hidden, weight = torch.randn(40, 16), torch.randn(3000, 16)
    targets = torch.randint(0, 3000, (40,))
    for temperature in (0.5, 1.0, 1.3):
        distribution = torch.distributions.Categorical(logits=hidden @ weight.T / temperature)
        logprob, entropy = ops.token_logprob(
            hidden, weight, targets, temperature=temperature, entropy=True
        )
        torch.testing.assert_close(logprob, distribution.log_prob(targets), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy, distribution.entropy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["composed", "native"])
def test_weight_gradient_is_accumulated_in_fp32(backend):
    """One tile of rows contributes much, 15 more too little for a bf16 sum to notice each: it
    would lose 3 % (Liger #1323)."""
    if backend == "composed":
        run, rows = composed, composed.ROWS
    else:
        run = pytest.importorskip("llama2rt.ops.cpu")
        rows = run.LOGPROB_ROWS
    hidden = torch.full((16 * rows, 4), 0.125, dtype=torch.bfloat16)
    hidden[:rows] = 64
    weight, ones = torch.zeros(8, 4, dtype=torch.bfloat16), torch.ones(16 * rows)
    targets = torch.zeros(16 * rows, dtype=torch.int64)
    _, _, lse = run.token_logprob(hidden, weight, targets, 1.0, False)
    _, dweight = run.token_logprob_backward(ones, None, hidden, weight, targets, lse, None, 1.0)
    total = rows * (64 + 15 * 0.125)
    assert dweight[0, 0].item() == pytest.approx(total * 7 / 8, rel=0.005)
    assert dweight[1, 0].item() == pytest.approx(-total / 8, rel=0.005)


def test_peak_memory_is_below_an_eighth_of_the_logits():
    """Beyond inputs and results, at the sizes of a training batch in bf16. The gradient of weight,
    which is a result, is there from the forward on and holds logits until backward."""
    run = pytest.importorskip("llama2rt.ops.cpu")
    tokens, dim, vocabulary = 2048, 512, 32000
    hidden, weight = torch.randn(tokens, dim).bfloat16(), torch.randn(vocabulary, dim).bfloat16()
    targets, ones = torch.randint(0, vocabulary, (tokens,)), torch.ones(tokens)
    lse = torch.full((tokens,), 100.0)
    backward = (ones, None, hidden, weight, targets, lse, None, 1.0)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    for call in (
        lambda: run.token_logprob(hidden, weight, targets, 1.0, False),
        lambda: run.token_logprob_backward(*backward),
        lambda: torch.autograd.grad(ops.token_logprob(*leaves, targets), leaves, ones),
    ):
        assert 0 < peak_extra_bytes(call) <= 2 * tokens * vocabulary / 8


def test_a_graph_may_be_differentiated_twice():
    """The second time no logits are parked any more; a gradient is not the next one's memory."""
    pytest.importorskip("llama2rt.ops.cpu")
    hidden = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    logprob = ops.token_logprob(hidden, weight, torch.randint(0, 50, (20,)))
    upstream = torch.randn(20)
    first = torch.autograd.grad(logprob, (hidden, weight), upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(logprob, (hidden, weight), 2 * upstream)
    for one, before, two in zip(first, kept, second, strict=True):
        assert torch.equal(one, before)
        torch.testing.assert_close(two, 2 * one)


def test_many_calls_in_a_graph_hold_no_gradient_each():
    """Logits are parked for one of them; beside it are the sum so far and what is added to it."""
    pytest.importorskip("llama2rt.ops.cpu")
    targets = torch.randint(0, 8000, (64,))
    leaves = [torch.randn(n, 128, requires_grad=True) for n in (64, 8000)]

    def call(count: int) -> tuple[Tensor, ...]:
        total = sum(ops.token_logprob(*leaves, targets).sum() for _ in range(count))
        return torch.autograd.grad(total, leaves)

    three, eight = (peak_extra_bytes(lambda count=count: call(count)) for count in (3, 8))
    assert eight < three + leaves[1].nbytes / 4
    for one, sum_of_eight in zip(call(1), call(8), strict=True):
        torch.testing.assert_close(sum_of_eight, 8 * one)


def test_parking_goes_on_after_a_backward_and_after_a_dropped_graph(monkeypatch):
    pytest.importorskip("llama2rt.ops.cpu")
    hidden, weight = torch.randn(20, 16), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (20,))
    parks = []
    real = contract._can_park
    monkeypatch.setattr(contract, "_can_park", lambda *xs: parks.append(real(*xs)) or parks[-1])
    ops.token_logprob(hidden, weight, targets).sum().backward()
    ops.token_logprob(hidden, weight, targets)  # and dropped
    kept = ops.token_logprob(hidden, weight, targets)
    other = ops.token_logprob(hidden, weight.detach().requires_grad_(), targets)
    ops.token_logprob(hidden, weight, targets)  # while `kept` lives
    assert parks == [True, True, True, True, False]
    assert weight.grad is not None and torch.equal(kept, other)


def test_logits_are_parked_only_where_weight_wants_a_gradient(monkeypatch):
    pytest.importorskip("llama2rt.ops.cpu")
    calls = []
    real = logprob_tiles.forward
    monkeypatch.setattr(
        logprob_tiles, "forward", lambda *xs: calls.append(len(xs) == 8) or real(*xs)
    )
    hidden, weight = torch.randn(20, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(0, 50, (20,))
    ops.token_logprob(hidden, weight, targets).sum().backward()
    with torch.no_grad():
        ops.token_logprob(hidden, weight.requires_grad_(), targets)
    assert calls and not any(calls)
    calls.clear()
    ops.token_logprob(hidden, weight, targets)
    assert all(calls)
