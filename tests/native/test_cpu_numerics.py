"""Every kernel of `_cpu`, for each instruction set and dtype, by the rule of `numerics.judge`.

Yardsticks in the same dtype are those of `elementwise_cases`, `attention_cases`, `decode_cases` and
`logprob_cases`; of the linear layer and the gradient of its weight, torch's own product.
"""

import functools
import math

import decode_cases
import pytest
import torch
import torch.nn.functional as F
from attention_cases import offsets, sdpa
from elementwise_cases import KINDS, check_rms_norm, check_rope, check_swiglu, shape_name
from logprob_cases import torch_formulation
from numerics import draw, judge, judge_gradients, leaves_of, wide
from torch import Tensor

from llama2rt import _cpu
from llama2rt.ops import composed, cpu, logprob_tiles, reference
from llama2rt.ops.cpu_kernels import token_logprob

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

# One column is left out: there dx is 0 but for eps, a difference of two equal numbers.
SHAPES = [(1, 7), (2, 64), (5, 203), (113, 65), (67, 1040)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_rms_norm(shape, kind, dtype, seed):
    check_rms_norm(cpu, shape, kind, dtype, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_swiglu(shape, kind, dtype, seed):
    check_swiglu(cpu, shape, kind, dtype, seed)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 1), (52, 52), (5, 0)])
@pytest.mark.parametrize("dim", [2, 24, 48, 128, 256])
def test_rope(dim, heads, kv_heads, index, dtype, seed):
    kinds = ("tail", "tail")
    check_rope(cpu, 7, heads, kv_heads, dim, dtype, seed, kinds=kinds, index=index, rows=1024)


@pytest.mark.parametrize("kind", ["normal", "tail", "offset"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (7, 33), (129, 1040)])
def test_linear(columns, inner, rows, kind, dtype, seed):
    x, weight = (
        draw((rows, inner), dtype, kind, seed),
        draw((columns, inner), dtype, kind, seed + 1),
    )
    weight *= 0.02  # sums of a thousand products of numbers near 30 would be infinite in fp16
    exact = x.double() @ weight.double().T
    judge("y", cpu.linear(x, weight), exact, F.linear(x, weight))


def test_linear_of_any_strides_threads_and_rows_gives_the_same_bits(dtype, seed):
    x, strided = (draw((n, 300), dtype, "normal", seed) for n in (8, 514))
    x, strided = x[:, 7:210], strided[:, 90:293]
    expected = cpu.linear(x.contiguous(), strided.contiguous())
    assert torch.equal(cpu.linear(x, strided), expected)
    assert torch.equal(cpu.linear(x, strided.t().contiguous().t()), expected)
    torch.set_num_threads(3)
    assert torch.equal(cpu.linear(x, strided), expected)
    for row in range(8):
        assert torch.equal(cpu.linear(x[row : row + 1], strided)[0], expected[row])


# Remainders of a pair of rows, a vector, a panel, a block and a chunk of columns, and of a depth.
@pytest.mark.parametrize("kind", ["normal", "tail"])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"),
    [(1, 1, 1), (2, 8, 33), (7, 130, 16), (193, 9, 530), (385, 257, 48), (771, 20, 1025)],
)
def test_weight_gradient(rows, columns, inner, kind, dtype, seed):
    dy, x = draw((rows, columns), dtype, kind, seed), draw((rows, inner), dtype, kind, seed + 1)
    dy *= 0.02
    exact = dy.double().T @ x.double()
    judge("dweight", cpu.weight_gradient(dy, x), exact, dy.T @ x)


@pytest.mark.parametrize(("columns", "inner"), [(128, 128), (290, 70), (40, 1100), (1, 513)])
def test_threads_share_a_weight_gradient_to_the_bit(columns, inner, dtype, seed):
    """However they divide its rows and columns, none is left out."""
    dy, x = torch.randn(600, columns).to(dtype), torch.randn(600, inner).to(dtype)
    torch.set_num_threads(1)
    alone, total = cpu.weight_gradient(dy, x), torch.zeros(columns, inner)
    judge("dweight", alone, dy.double().T @ x.double(), dy.T @ x)
    for threads in (2, 3, 7, 64):
        torch.set_num_threads(threads)
        out = torch.full_like(alone, torch.nan)
        assert torch.equal(cpu.weight_gradient(dy, x, out), alone), threads
        cpu.add_weight_gradient(total, dy, x)
    torch.testing.assert_close(total / 4, dy.float().T @ x.float(), rtol=1e-4, atol=1e-3)


def test_weight_gradient_may_be_added_to_a_total(dtype, seed):
    dy, x = draw((50, 19), dtype, "normal", seed), draw((50, 35), dtype, "normal", seed + 1)
    total = torch.randn(19, 35)
    expected = total.double() + dy.double().T @ x.double()
    cpu.add_weight_gradient(total, dy, x)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_weight_gradient_of_nothing(shape, dtype):
    rows, columns, inner = shape
    dy, x = torch.ones(rows, columns, dtype=dtype), torch.ones(rows, inner, dtype=dtype)
    assert torch.equal(cpu.weight_gradient(dy, x), torch.zeros(columns, inner, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_linear_of_nothing(shape, dtype):
    rows, columns, inner = shape
    y = cpu.linear(torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype))
    assert y.shape == (rows, columns) and not y.any()


# heads, kv_heads, head_dim, lengths of documents in queries and, where they differ, in keys.
RAGGED = (1, 2, 0, 113, 203, 1, 60)
ATTENTION = {
    "one head each": (8, 8, 16, RAGGED, None),
    "groups": (8, 2, 24, RAGGED, None),
    "one group": (8, 1, 64, RAGGED, None),
    "many heads": (52, 52, 8, (1, 2, 113, 203), None),
    "long": (4, 2, 32, (1, 1024, 2, 113, 203), None),
    "odd dim": (2, 2, 7, RAGGED, None),
    "widest dim": (2, 1, 256, (33, 70), None),
    "cached keys": (4, 2, 40, (1, 0, 7, 130), (90, 5, 7, 300)),
}


@functools.cache
def attention_case(
    name: str, causal: bool, kind: str, dtype: torch.dtype, seed: int
) -> tuple[tuple, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Arguments (dout first), what the reference makes of them in fp64, and what torch does."""
    heads, kv_heads, dim, queries, keys = ATTENTION[name]
    keys = keys or queries
    rows, columns = sum(queries), sum(keys)
    q = draw((rows, heads, dim), dtype, kind, seed)
    k = draw((columns, kv_heads, dim), dtype, "normal", seed + 1)
    v = draw((columns, kv_heads, dim), dtype, kind, seed + 2)
    dout = draw((rows, heads, dim), dtype, "normal", seed + 3)
    rest = (offsets(queries), offsets(keys), 0, causal, dim**-0.5)
    out, lse = reference.attention(*wide(q, k, v), *rest)
    grads = reference.attention_backward(*wide(dout, q, k, v), out, lse, *rest)
    leaves = leaves_of(q, k, v)
    theirs = sdpa(*leaves, queries, keys, causal, dim**-0.5)
    yardstick = (theirs.detach(), *torch.autograd.grad(theirs, leaves, dout))
    return (dout, q, k, v, *rest), (out, lse, *grads), yardstick


@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, causal, kind, dtype, seed):
    arguments, exact, theirs = attention_case(name, causal, kind, dtype, seed)
    dout, q, k, v, *rest = arguments
    out, lse = cpu.attention(q, k, v, *rest)
    judge("out", out, exact[0], theirs[0])
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)
    ours = cpu.attention_backward(dout, q, k, v, out, lse, *rest)
    judge_gradients("dq dk dv", ours, exact[2:], theirs[1:])


@pytest.mark.parametrize("scale", [0.125, 3.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(8, 8, 16), (8, 2, 128), (8, 1, 40), (52, 52, 24), (6, 3, 72), (15, 5, 24), (7, 1, 136)],
)
def test_decode_attention(heads, kv_heads, dim, scale, dtype, seed):
    lengths = [0, 1, 8, 9, 16, 17, 113, 203]
    arguments = decode_cases.make(
        *(heads, kv_heads, dim, 8, dtype, "tail", seed, lengths), key_kind="normal"
    )
    decode_cases.check(cpu.decode_attention, arguments, scale, decode_cases.sdpa)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    [(2, 2, 16, 8), (6, 2, 72, 16), (8, 2, 40, 7), (8, 1, 256, 128)],
)
def test_decode_attention_of_several_queries(heads, kv_heads, dim, page, dtype, seed):
    ragged = decode_cases.RAGGED
    arguments = decode_cases.make(
        heads, kv_heads, dim, page, dtype, "tail", seed, key_kind="normal", **ragged
    )
    for scale in (dim**-0.5, -1.0):
        decode_cases.check(
            cpu.decode_attention, arguments, scale, decode_cases.sdpa, queries=ragged["queries"]
        )


def test_decode_attention_in_parts(dtype, seed):
    """Sequences of more tokens than a work item has; threads do not change the sums."""
    case = {"queries": [1, 3, 8, 1], "lengths": [1025, 2050, 1028, 1024]}
    arguments = decode_cases.make(4, 2, 24, 16, dtype, "tail", seed, key_kind="normal", **case)
    run = (cpu.decode_attention, arguments, 0.2, decode_cases.sdpa)
    decode_cases.check(*run, queries=case["queries"])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.decode_attention(*arguments, 0.2, offsets(case["queries"])))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    [(6, 6, 48, 16), (8, 2, 64, 16), (6, 2, 40, 5), (8, 1, 128, 128), (40, 40, 24, 32)],
)
def test_decode_attention_of_answers_to_one_prompt(heads, kv_heads, dim, page, dtype, seed):
    """Pages that neighbours have in common are read together: the bits are those of each sequence
    alone. Some have only one page in common, or leave the others before the prompt ends, or have
    several queries, and one has another prompt; more than read a part together."""
    prompt = 640
    lengths = [prompt, *range(prompt + 1, prompt + 20), 17, 300, prompt, 645, 649, 642]
    common = [0, *[prompt] * 19, 0, 0, 0, 640, 640, 0]
    common[5] = round_down(130, page)
    queries = [1] * len(lengths)
    queries[9] = 3
    case = {"key_kind": "normal", "queries": queries, "common": common}
    arguments = decode_cases.make(heads, kv_heads, dim, page, dtype, "tail", seed, lengths, **case)
    scale = dim**-0.5
    decode_cases.check(cpu.decode_attention, arguments, scale, decode_cases.sdpa, queries=queries)
    cu_q = offsets(queries)
    torch.set_num_threads(2)
    out = cpu.decode_attention(*arguments, scale, cu_q)
    q, k, v, table, seen = arguments
    for i, count in enumerate(queries):
        rows, one = slice(cu_q[i], cu_q[i + 1]), slice(i, i + 1)
        alone = cpu.decode_attention(q[rows], k, v, table[one], seen[one], scale, offsets([count]))
        assert torch.equal(out[rows], alone)


def round_down(n: int, step: int) -> int:
    return n // step * step


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize(
    ("shape", "tiling", "stashed_columns"),
    [
        ((33, 8, 2), (32, 64), None),
        ((64, 5, 65), (32, 64), 64 + 0),
        ((70, 24, 203), (32, 64), None),
        ((30, 24, 203), (32, 128), 128 + 48),
        ((70, 72, 203), (32, 64), 64 + 64 + 64),
        ((90, 72, 203), (32, 128), 128 + 48),
        ((75, 40, 700), (2048, 600), 600 + 48),
        ((64, 64, 100), (2048, 64), 64 + 32),
    ],
    ids=str,
)
def test_token_logprob(
    shape, tiling, stashed_columns, kind, with_entropy, dtype, seed, monkeypatch
):
    """Several tiles of rows and of columns, each with a remainder; with some or all logits stashed
    in the gradient of weight and in a tile (of the first rows; counted here), the others formed
    in that tile before, or (None) no stash at all."""
    size = logprob_tiles.Tiles(*tiling)
    monkeypatch.setattr(logprob_tiles, "CPU", size)
    tokens, dim, vocabulary = shape
    temperature = 0.7
    hidden = draw((tokens, dim), dtype, kind, seed)
    weight = draw((vocabulary, dim), dtype, "normal", seed + 1) * 0.3
    # Targets on both sides of each boundary: of pieces, of tiles, and of the vocabulary.
    boundaries = [c for c in (32, 48, 64, 96, 128, 300, 600) if c < vocabulary]
    edges = [0, *(c - side for c in boundaries for side in (1, 0)), vocabulary - 1]
    targets = torch.randint(-1, vocabulary, (tokens,))
    targets[-len(edges) :] = torch.tensor(edges[-tokens:])
    dlogprob = draw((tokens,), torch.float32, "normal", seed + 2)
    dentropy = draw((tokens,), torch.float32, "normal", seed + 3) if with_entropy else None

    forward = (hidden, weight, targets, temperature, with_entropy)
    if stashed_columns is None:
        logprob, entropy, lse = cpu.token_logprob(*forward)
    else:
        logprob, entropy, lse, *memories = cpu.token_logprob_stashed(*forward)
        stash = logprob_tiles.Stash(*memories)
        rows = slice(0, min(tokens, size.rows))
        kept = (
            stash.logits(rows, part, tokens) for part in composed.tiles(vocabulary, size.columns)
        )
        assert sum(logits.shape[1] for logits in kept) == stashed_columns
    inputs = (*wide(hidden, weight), targets)
    exact, exact_entropy, exact_lse = reference.token_logprob(*inputs, temperature, with_entropy)
    leaves = leaves_of(hidden, weight)
    theirs, their_entropy = torch_formulation(*leaves, targets, temperature, less_mean=True)
    judge("logprob", logprob, exact, theirs.detach())
    assert (logprob <= 0).all()
    if with_entropy:
        judge("entropy", entropy, exact_entropy, their_entropy.detach())

    entropies = entropy if with_entropy else None
    backward = (dlogprob, dentropy, hidden, weight, targets, lse, entropies, temperature)
    if stashed_columns is None:
        ours = cpu.token_logprob_backward(*backward)
    else:
        ours = cpu.token_logprob_stashed_backward(*stash, *backward), stash.dweight
    expected = reference.token_logprob_backward(
        dlogprob.double(),
        dentropy.double() if with_entropy else None,
        *inputs,
        exact_lse,
        exact_entropy if with_entropy else None,
        temperature,
    )
    total = theirs @ dlogprob + (their_entropy @ dentropy if with_entropy else 0)
    yardstick = torch.autograd.grad(total, leaves)
    judge_gradients("dhidden dweight", ours, expected, yardstick)


def test_token_logprob_uses_our_product_where_it_is_the_faster(isa, dtype, monkeypatch):
    calls = []
    real = token_logprob.weight_gradient
    monkeypatch.setattr(token_logprob, "weight_gradient", lambda *xs: calls.append(xs) or real(*xs))
    hidden, weight = torch.randn(9, 8).to(dtype), torch.randn(50, 8).to(dtype)
    targets, ones = torch.randint(0, 50, (9,)), torch.ones(9)
    cpu.token_logprob_backward(ones, None, hidden, weight, targets, ones, None, 1.0)
    pairs_but_no_tiles = isa == "avx512bf16" and not _cpu.has_amx()
    assert len(calls) == (dtype == torch.bfloat16 and pairs_but_no_tiles)


@pytest.mark.parametrize("columns", [1, 5, 16, 19, 64, 83])
@pytest.mark.parametrize("level", [-30000.0, 30000.0])
def test_token_logprob_of_logits_far_from_zero(columns, level, dtype):
    """No lane beyond a row's end counts as a logit of zero, nor any number before the first."""
    hidden = torch.ones(3, 1, dtype=dtype)
    weight = (level - torch.arange(columns)[:, None].float()).to(dtype)
    targets = torch.tensor([0, columns // 2, columns - 1])
    logprob, entropy, lse = cpu.token_logprob(hidden, weight, targets, 256.0, True)
    exact = reference.token_logprob(*wide(hidden, weight), targets, 256.0, True)
    # The products are exact, so only the softmax rounds.
    torch.testing.assert_close(logprob.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 5, 16, 19, 64, 83])
def test_token_logprob_of_logits_near_the_largest_number(columns):
    """Lanes beyond a row's end are infinitely far below these, and still do not count."""
    hidden, weight = torch.ones(1, 1), torch.full((columns, 1), 1e35)
    logprob, entropy, _ = cpu.token_logprob(hidden, weight, torch.tensor([0]), 1.0, True)
    torch.testing.assert_close(-logprob, entropy)
    torch.testing.assert_close(entropy.exp(), torch.tensor([float(columns)]))


def test_every_16_bit_value_is_read_and_rounded_as_torch_does(dtype, isa):
    """All 65536 bit patterns through a load, a multiplication and a store."""
    if dtype == torch.float32:
        pytest.skip("fp32 is not converted")
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    factors = torch.cat((torch.tensor([1.0, 0.5, 3.0, 1 / 3, 2.0**-15, 2.0**15]), torch.rand(10)))
    # One token per factor; each pair is (value, 0), turned by a "cosine" that is the factor.
    x = torch.stack((values, torch.zeros_like(values)), -1)[None].expand(len(factors), -1, -1)
    no_sine = torch.zeros(len(factors), 1)
    ours, _ = cpu.rope(x, x[:, :0], factors[:, None], no_sine, torch.arange(len(factors)))
    ours, expected = ours[..., 0], (values.float() * factors[:, None]).to(dtype)
    exact = ours.eq(expected) | (ours.isnan() & values.isnan())
    if isa == "avx512bf16" and dtype == torch.bfloat16:
        # The instruction takes subnormal numbers for zero; there is none among real activations.
        exact |= ours.eq(0) & expected.abs().le(2.0**-126)
    assert exact.all()


def test_subnormal_numbers_of_bf16_are_right_or_zero_where_the_processor_has_no_others(isa):
    """What docs/numerics.md says of numbers below 2^-126, for every op that returns bf16."""
    dtype, rows = torch.bfloat16, offsets([1, 40])
    tiny = torch.full((41, 4, 16), 7e-40, dtype=dtype)
    one, few = torch.ones_like(tiny), tiny[:, 0]
    pages, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([41], dtype=torch.int32)
    flat = torch.zeros(41, dtype=torch.int32)
    results = {
        "attention": cpu.attention(one, one, tiny, rows, rows, 0, True, 0.25)[0],
        "decode_attention": cpu.decode_attention(
            one[:1], one[None], tiny[None], pages, lengths, 0.25
        ),
        "rope": cpu.rope(tiny, tiny, torch.ones(1, 8), torch.zeros(1, 8), flat)[0],
        "rms_norm": cpu.rms_norm(one[:, 0], few[0], 0.0)[0],
        "swiglu": cpu.swiglu(torch.full_like(few, 2.0), few),
        "linear": cpu.linear(torch.eye(16, dtype=dtype), few[:5]),
    }
    flushes, silu = isa == "avx512bf16", 2 / (1 + math.exp(-2))
    for op, found in results.items():
        expected = few[0, 0].double() * (silu if op == "swiglu" else 1.0)
        right = (found.double() - expected).abs() <= 2 * 2.0**-133  # two steps of a subnormal
        assert (right | (found.eq(0) & flushes)).all(), op
    # Instructions that multiply pairs of bf16 see 0, whatever the sum is kept in.
    assert results["attention"].eq(0).all() == flushes
    logprob, *_ = cpu.token_logprob(few, few[:5], torch.zeros(41).long(), 1.0, False)
    torch.testing.assert_close(logprob, torch.full((41,), -torch.tensor(5.0).log().item()))
