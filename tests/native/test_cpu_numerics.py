"""Every kernel of `_cpu`, for each instruction set and dtype, by the rule of `numerics.judge`.

Yardsticks in the same dtype: LLaMA's own RMSNorm (fp32 inside, cast, times weight), silu(gate)
times up, Hugging Face's rotary embedding with tables in the storage dtype, SDPA per document and
per decoded sequence, torch.logsumexp in fp32 of logits in the storage dtype.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import draw, judge
from torch import Tensor

from llama2rt.ops import composed, cpu, logprob_tiles, reference

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

# One column is left out: there dx is 0 but for eps, a difference of two equal numbers.
SHAPES = [(1, 7), (2, 64), (5, 203), (113, 65), (67, 1040)]
KINDS = ["normal", "small", "tail", "offset"]
EPS = 1e-5


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


def gradients(outputs: Tensor, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, dout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, kind, dtype, seed):
    x, dy = draw(shape, dtype, kind, seed), draw(shape, dtype, "normal", seed + 1)
    weight = draw(shape[1:], dtype, "normal", seed + 2)
    y, rstd = cpu.rms_norm(x, weight, EPS)
    exact, exact_rstd = reference.rms_norm(*wide(x, weight), EPS)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = llama_rms_norm(*leaves)
    judge("y", y, exact, theirs.detach())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)

    expected = reference.rms_norm_backward(*wide(dy, x, weight), exact_rstd)
    yardstick = gradients(theirs, leaves, dy)
    for name, *three in zip(
        ("dx", "dweight"),
        cpu.rms_norm_backward(dy, x, weight, rstd),
        expected,
        yardstick,
        strict=True,
    ):
        judge(name, *three, gradient=True)


@pytest.mark.parametrize("with_dsummed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, kind, with_dsummed, dtype, seed):
    x, residual = draw(shape, dtype, kind, seed), draw(shape, dtype, kind, seed + 1)
    dy, dsummed = draw(shape, dtype, "normal", seed + 2), draw(shape, dtype, "normal", seed + 3)
    weight = draw(shape[1:], dtype, "normal", seed + 4)
    y, summed, rstd = cpu.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    exact, _, _ = reference.add_rms_norm(*wide(x, residual, weight), EPS)
    judge("y", y, exact, llama_rms_norm(x + residual, weight))

    leaves = [summed.clone().requires_grad_(), weight.clone().requires_grad_()]
    _, exact_rstd = reference.rms_norm(*wide(summed, weight), EPS)
    extra = dsummed if with_dsummed else None
    ours = cpu.add_rms_norm_backward(dy, extra, summed, weight, rstd)
    expected = reference.add_rms_norm_backward(
        dy.double(), extra if extra is None else extra.double(), *wide(summed, weight), exact_rstd
    )
    dx, dweight = gradients(llama_rms_norm(*leaves), leaves, dy)
    yardstick = (dx if extra is None else dx + extra, dweight)
    for name, *three in zip(("dx", "dweight"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, kind, dtype, seed):
    gate, up = draw(shape, dtype, kind, seed), draw(shape, dtype, kind, seed + 1)
    dy = draw(shape, dtype, "normal", seed + 2)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    theirs = F.silu(leaves[0]) * leaves[1]
    judge("y", cpu.swiglu(gate, up), reference.swiglu(*wide(gate, up)), theirs.detach())
    for name, *three in zip(
        ("dgate", "dup"),
        cpu.swiglu_backward(dy, gate, up),
        reference.swiglu_backward(*wide(dy, gate, up)),
        gradients(theirs, leaves, dy),
        strict=True,
    ):
        judge(name, *three, gradient=True)


def tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def hugging_face_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (52, 52)])
@pytest.mark.parametrize("head_dim", [2, 24, 128, 256])
def test_rope(head_dim, heads, positions_dtype, dtype, seed):
    cos, sin = tables(1024, head_dim)
    positions = torch.randint(1024, (7,)).to(positions_dtype)
    q, k = (draw((7, h, head_dim), dtype, "tail", seed + i) for i, h in enumerate(heads))
    c, s = cos[positions.long()], sin[positions.long()]
    for name, run, exact, direction in (
        ("forward", cpu.rope, reference.rope, 1),
        ("backward", cpu.rope_backward, reference.rope_backward, -1),
    ):
        ours = run(q, k, cos, sin, positions)
        expected = exact(*wide(q, k, cos, sin), positions)
        for x, got, want in zip((q, k), ours, expected, strict=True):
            judge(name, got, want, hugging_face_rope(x, c, direction * s))


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
    wide, weight = draw((8, 300), dtype, "normal", seed), draw((514, 300), dtype, "normal", seed)
    x = wide[:, 7:210]
    strided = weight[:, 90:293]
    expected = cpu.linear(x.contiguous(), strided.contiguous())
    assert torch.equal(cpu.linear(x, strided), expected)
    assert torch.equal(cpu.linear(x, strided.t().contiguous().t()), expected)
    torch.set_num_threads(3)
    assert torch.equal(cpu.linear(x, strided), expected)
    for row in range(8):
        assert torch.equal(cpu.linear(x[row : row + 1], strided)[0], expected[row])


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_linear_of_nothing(shape, dtype):
    rows, columns, inner = shape
    y = cpu.linear(torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype))
    assert y.shape == (rows, columns) and not y.any()


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> Tensor:
    """torch's attention, one document at a time."""
    parts = []
    for rows, keys in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        one = q[slice(*rows)].transpose(0, 1)[None]
        two, three = (x[slice(*keys)].transpose(0, 1)[None] for x in (k, v))
        queries, seen = one.shape[2], two.shape[2]
        mask = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries) if causal else None
        out = F.scaled_dot_product_attention(one, two, three, mask, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


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
    cu_q, cu_k = offsets(queries), offsets(keys or queries)
    rows, columns = (sum(x) for x in (queries, keys or queries))
    q = draw((rows, heads, dim), dtype, kind, seed)
    k = draw((columns, kv_heads, dim), dtype, "normal", seed + 1)
    v = draw((columns, kv_heads, dim), dtype, kind, seed + 2)
    dout = draw((rows, heads, dim), dtype, "normal", seed + 3)
    rest = (cu_q, cu_k, 0, causal, dim**-0.5)
    out, lse = reference.attention(*wide(q, k, v), *rest)
    grads = reference.attention_backward(*wide(dout, q, k, v), out, lse, *rest)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = sdpa(*leaves, cu_q, cu_k, causal, dim**-0.5)
    yardstick = (theirs.detach(), *gradients(theirs, leaves, dout))
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
    for name, *three in zip(("dq", "dk", "dv"), ours, exact[2:], theirs[1:], strict=True):
        judge(name, *three, gradient=True)


def gather(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The cached rows of one sequence, [1, Hkv, length, D]."""
    return cache[pages].flatten(0, 1)[:length].transpose(0, 1)[None]


@pytest.mark.parametrize("scale", [0.125, 3.0])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim"),
    [(8, 8, 16), (8, 2, 128), (8, 1, 40), (52, 52, 24)],
)
def test_decode_attention(query_heads, kv_heads, head_dim, scale, dtype, seed):
    page, lengths = 8, torch.tensor([0, 1, 8, 9, 16, 17, 113, 203])
    block_table = torch.randint(40, (8, 26))
    q = draw((8, query_heads, head_dim), dtype, "normal", seed)
    k_cache = draw((40, page, kv_heads, head_dim), dtype, "normal", seed + 1)
    v_cache = draw((40, page, kv_heads, head_dim), dtype, "tail", seed + 2)
    ours = cpu.decode_attention(q, k_cache, v_cache, block_table, lengths, scale)
    exact = reference.decode_attention(*wide(q, k_cache, v_cache), block_table, lengths, scale)
    theirs = torch.zeros_like(q)
    for i, length in enumerate(lengths.tolist()):
        if length:
            k, v = gather(k_cache, block_table[i], length), gather(v_cache, block_table[i], length)
            theirs[i] = F.scaled_dot_product_attention(
                q[i][None, :, None], k, v, scale=scale, enable_gqa=True
            )[0, :, 0]
    judge("out", ours, exact, theirs)
    assert not ours[0].any(), "length 0 gives 0"


def eager_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) from all logits at once."""
    logits = F.linear(hidden, weight).float() / temperature
    lse = logits.logsumexp(-1)
    chosen = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    mean = ((logits - lse[:, None]).exp() * logits).sum(-1)
    return tuple(torch.where(targets >= 0, x, 0.0) for x in (chosen - lse, lse - mean))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize(
    ("shape", "tiling", "parked_columns"),
    [
        ((33, 8, 2), (32, 64, 24), None),
        ((64, 5, 65), (32, 64, 24), 64 + 0),
        ((70, 24, 203), (32, 64, 24), None),
        ((30, 24, 203), (32, 128, 24), 128 + 48),
        ((70, 72, 203), (32, 64, 24), 64 + 64 + 64),
        ((90, 72, 203), (32, 128, 40), 128 + 48),
        ((75, 40, 700), (2048, 600, 1024), 600 + 48),
    ],
    ids=str,
)
def test_token_logprob(shape, tiling, parked_columns, kind, with_entropy, dtype, seed, monkeypatch):
    """Several tiles of rows and of columns, each with a remainder, and strips inside them; with
    some or all logits parked in the gradient of weight and in a tile (of the first rows; counted
    here), or (None) no parking at all."""
    size = logprob_tiles.Tiles(*tiling)
    monkeypatch.setattr(logprob_tiles, "CPU", size)
    tokens, dim, vocabulary = shape
    temperature = 0.7
    hidden = draw((tokens, dim), dtype, kind, seed)
    weight = draw((vocabulary, dim), dtype, "normal", seed + 1) * 0.3
    # Targets on both sides of each boundary: of strips, of tiles, and of the vocabulary.
    edges = [c for c in (0, 23, 24, 63, 64, 87, 88, vocabulary - 1) if c < vocabulary]
    targets = torch.randint(-1, vocabulary, (tokens,))
    targets[-len(edges) :] = torch.tensor(edges[-tokens:])
    dlogprob = draw((tokens,), torch.float32, "normal", seed + 2)
    dentropy = draw((tokens,), torch.float32, "normal", seed + 3) if with_entropy else None

    forward = (hidden, weight, targets, temperature, with_entropy)
    if parked_columns is None:
        logprob, entropy, lse = cpu.token_logprob(*forward)
    else:
        logprob, entropy, lse, *memories = cpu.token_logprob_parked(*forward)
        parking = logprob_tiles.Parking(*memories)
        rows = slice(0, min(tokens, size.rows))
        kept = (
            parking.logits(rows, part, tokens) for part in composed.tiles(vocabulary, size.columns)
        )
        assert sum(logits.shape[1] for logits in kept) == parked_columns
    inputs = (*wide(hidden, weight), targets)
    exact, exact_entropy, exact_lse = reference.token_logprob(*inputs, temperature, with_entropy)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs, their_entropy = eager_logprob(*leaves, targets, temperature)
    judge("logprob", logprob, exact, theirs.detach())
    assert (logprob <= 0).all()
    if with_entropy:
        judge("entropy", entropy, exact_entropy, their_entropy.detach())

    spread = entropy if with_entropy else None
    backward = (dlogprob, dentropy, hidden, weight, targets, lse, spread, temperature)
    if parked_columns is None:
        ours = cpu.token_logprob_backward(*backward)
    else:
        ours = cpu.token_logprob_parked_backward(*parking, *backward), parking.dweight
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
    for name, *three in zip(("dhidden", "dweight"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)


def test_every_16_bit_value_is_read_and_rounded_as_torch_does(dtype, isa, seed):
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
