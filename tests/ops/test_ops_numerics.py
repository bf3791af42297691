"""Decoding and token_logprob on a CPU by the rule of `numerics.judge`, and what other projects got
wrong in them and in attention.

The yardsticks and the inputs are in `decode_cases` and `logprob_cases`.
"""

import itertools

import decode_cases
import logprob_cases
import pytest
import torch
from attention_cases import offsets
from memory import peak_extra_bytes
from numerics import draw
from torch import Tensor

from llama2rt import ops
from llama2rt.ops import composed, logprob_tiles
from llama2rt.ops.contract import token_logprob as contract

RAGGED = [1, 2, 0, 113, 203, 1, 60, 58, 57]


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


@pytest.fixture(params=["composed", "native"])
def run(request):
    """The functions of torch calls, and of the CPU's kernels."""
    return composed if request.param == "composed" else pytest.importorskip("llama2rt.ops.cpu")


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
def test_decode_attention(heads, kv_heads, run, dtype, seed):
    lengths = [1, 0, 17, 16, 40]
    arguments = decode_cases.make(heads, kv_heads, 24, 16, dtype, "normal", seed, lengths)
    decode_cases.check(run.decode_attention, arguments, 24**-0.5, decode_cases.sdpa)


def test_decode_attention_of_several_queries(run, dtype, seed):
    ragged = decode_cases.RAGGED
    arguments = decode_cases.make(4, 2, 24, 16, dtype, "normal", seed, **ragged)
    decode_cases.check(
        run.decode_attention, arguments, 24**-0.5, decode_cases.sdpa, queries=ragged["queries"]
    )


@pytest.mark.parametrize("backend", ["reference", None])
def test_queries_of_a_sequence_are_one_after_the_other(backend):
    """Several at once are what each gives alone, when the cache ended with it."""
    q, caches = torch.randn(9, 4, 8), torch.randn(2, 6, 4, 2, 8)
    table = torch.tensor([[3, 1, 5], [2, 0, 4]])
    lengths, queries = torch.tensor([11, 9]), [3, 6]
    with ops.use(backend):
        together = ops.decode_attention(q, *caches, table, lengths, cu_seqlens_q=offsets(queries))
        seen = torch.tensor([9, 10, 11, 4, 5, 6, 7, 8, 9])
        rows = table.repeat_interleave(torch.tensor(queries), 0)
        torch.testing.assert_close(together, ops.decode_attention(q, *caches, rows, seen))
        k, v = (x[table].flatten(1, 2) for x in caches)
        packed = (torch.cat((x[0, :11], x[1, :9])) for x in (k, v))
        cu_q, cu_k = (offsets(n) for n in (queries, lengths.tolist()))
        attention = ops.attention(q, *packed, cu_q, cu_seqlens_k=cu_k)
        torch.testing.assert_close(together, attention)


@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize(
    ("tokens", "dim", "vocabulary"), [(1, 8, 3), (70, 32, 500), (1100, 24, 1100), (2100, 8, 2100)]
)
def test_token_logprob(tokens, dim, vocabulary, kind, run, dtype, seed):
    logprob_cases.check(run, tokens, dim, vocabulary, kind, dtype, 0.7, seed)


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


def test_weight_gradient_is_summed_in_fp32(run):
    rows = composed.ROWS if run is composed else logprob_tiles.CPU.rows
    logprob_cases.check_weight_gradient_is_summed_in_fp32(run, rows, tiles=16, large=64.0)


def test_peak_memory_is_below_an_eighth_of_the_logits():
    """Beyond inputs and results, at the sizes of a training batch. The gradient of weight, which is
    a result, is there from the forward on and holds logits until backward.

    In bf16; where the processor would take minutes for bf16's products, backward is in fp32."""
    run = pytest.importorskip("llama2rt.ops.cpu")
    native = pytest.importorskip("llama2rt._cpu")
    fast = "avx512bf16" in native.instruction_sets()
    tokens, dim, vocabulary = 2048, 512, 32000
    hidden, weight = torch.randn(tokens, dim), torch.randn(vocabulary, dim)
    targets, ones = torch.randint(0, vocabulary, (tokens,)), torch.ones(tokens)
    lse = torch.full((tokens,), 100.0)

    def require_small(dtype, call):
        assert 0 < peak_extra_bytes(call) <= dtype.itemsize * tokens * vocabulary / 8

    rounded = hidden.bfloat16(), weight.bfloat16()
    require_small(torch.bfloat16, lambda: run.token_logprob(*rounded, targets, 1.0, False))
    dtype = torch.bfloat16 if fast else torch.float32
    hidden, weight = rounded if fast else (hidden, weight)
    backward = (ones, None, hidden, weight, targets, lse, None, 1.0)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    for call in (
        lambda: run.token_logprob_backward(*backward),
        lambda: torch.autograd.grad(ops.token_logprob(*leaves, targets), leaves, ones),
    ):
        require_small(dtype, call)


def test_a_graph_may_be_differentiated_twice():
    """The second time no logits are stashed any more; a gradient is not the next one's memory."""
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
    """Logits are stashed for one of them; beside it are the sum so far and what is added to it."""
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


def test_stash_goes_on_after_a_backward_and_after_a_dropped_graph(monkeypatch):
    pytest.importorskip("llama2rt.ops.cpu")
    hidden, weight = torch.randn(20, 16), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (20,))
    stashes = []
    real = contract._can_stash
    monkeypatch.setattr(
        contract, "_can_stash", lambda *xs: stashes.append(real(*xs)) or stashes[-1]
    )
    ops.token_logprob(hidden, weight, targets).sum().backward()
    ops.token_logprob(hidden, weight, targets)  # and dropped
    kept = ops.token_logprob(hidden, weight, targets)
    other = ops.token_logprob(hidden, weight.detach().requires_grad_(), targets)
    ops.token_logprob(hidden, weight, targets)  # while `kept` lives
    assert stashes == [True, True, True, True, False]
    assert weight.grad is not None and torch.equal(kept, other)


def test_logits_are_stashed_only_where_weight_wants_a_gradient(monkeypatch):
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
