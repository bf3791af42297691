"""Attention in Triton, interpreted, by the rule of `numerics.judge`, and the promises beside it.

Yardstick in the same dtype: SDPA's formulation in plain torch, one document at a time.
"""

import itertools

import pytest
import torch
from numerics import draw, judge

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt import ops
from llama2rt.kernels import attention as kernels
from llama2rt.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

RAGGED = [1, 2, 0, 17, 113]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles to a document of 113 tokens, full ones and cut ones; rows and keys differ."""
    for name, rows, keys in (("FORWARD", 64, 32), ("DQ", 32, 64), ("DKDV", 64, 32)):
        launch = kernels.Launch(rows, keys, 4, 1)
        monkeypatch.setattr(kernels, name, {80: dict.fromkeys((64, 128, 256), launch)})
    exact = dict.fromkeys((64, 128, 256), kernels.Launch(32, 64, 4, 1))
    monkeypatch.setattr(kernels, "EXACT", exact)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def plain(q, k, v, lengths_q, lengths_k, causal, scale):
    """torch's attention, one document at a time, in the tensors' dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    parts = []
    for one, two, three in zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True
    ):
        one, two, three = (x.transpose(0, 1) for x in (one, two, three))
        scores = one @ two.transpose(1, 2) * scale
        if causal:
            queries, keys = scores.shape[1:]
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1, dtype=torch.float32).to(q.dtype).nan_to_num(0.0)
        parts.append((p @ three).transpose(0, 1))
    return torch.cat(parts)


def check(
    heads,
    kv_heads,
    dim,
    dtype,
    seed,
    *,
    kind="normal",
    causal=True,
    queries=RAGGED,
    keys=None,
    scale=None,
):
    keys = queries if keys is None else keys
    scale = dim**-0.5 if scale is None else scale
    # The interpreter rounds the product in exp2(scores * scale - peak), which a GPU fuses with the
    # subtraction: in fp32 that shows where scores are large, so there only v has heavy columns.
    of_q = "normal" if (kind, dtype) == ("tail", torch.float32) else kind
    q = draw((sum(queries), heads, dim), dtype, of_q, seed)
    k = draw((sum(keys), kv_heads, dim), dtype, "normal", seed + 1)
    v = draw((sum(keys), kv_heads, dim), dtype, kind, seed + 2)
    dout = draw((sum(queries), heads, dim), dtype, "normal", seed + 3)
    rest = (offsets(queries), offsets(keys), 0, causal, scale)
    before = [x.clone() for x in (dout, q, k, v)]
    out, lse = kernels.attention(q, k, v, *rest)
    wide = [x.double() for x in (dout, q, k, v)]
    exact, exact_lse = reference.attention(*wide[1:], *rest)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = plain(*leaves, queries, keys, causal, scale)
    judge("out", out, exact, theirs.detach())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    ours = kernels.attention_backward(dout, q, k, v, out, lse, *rest)
    expected = reference.attention_backward(*wide, exact, exact_lse, *rest)
    # A row that sees no key gives plain torch NaN gradients, which are 0.
    yardstick = [x.nan_to_num(0.0) for x in torch.autograd.grad(theirs, leaves, dout)]
    for name, *three in zip(("dq", "dk", "dv"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)
    assert all(torch.equal(*pair) for pair in zip(before, (dout, q, k, v), strict=True))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 8, 16), (8, 2, 80), (8, 1, 64)])
def test_causal(heads, kv_heads, dim, dtype, seed):
    check(heads, kv_heads, dim, dtype, seed)


def test_not_causal(dtype, seed):
    check(8, 2, 16, dtype, seed, causal=False)


@pytest.mark.parametrize("kind", ["small", "tail"])
def test_hard_inputs(kind, dtype, seed):
    check(2, 1, 24, dtype, seed, kind=kind)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(causal, seed):
    """More keys, fewer keys (rows that see none), no keys, no queries, and a group of 3."""
    check(
        3,
        1,
        16,
        torch.float32,
        seed,
        causal=causal,
        queries=[3, 70, 5, 0, 9],
        keys=[90, 37, 0, 4, 9],
    )


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale, seed):
    check(2, 1, 16, torch.float32, seed, scale=scale, queries=[2, 40])


def test_tiles_are_found_whatever_the_lengths(seed):
    """Every row of every document is in exactly one tile: out is written, and written once."""
    lengths = torch.randint(0, 40, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths[::7] = [0] * len(lengths[::7])
    lengths[5:8] = [32, 64, 96]
    check(1, 1, 16, torch.float32, seed, queries=lengths)


def test_any_strides_and_repeatable():
    """One fused projection's output, a transposed one, and a gradient of stride 0."""
    cu, tokens = offsets([2, 0, 70]), 72
    fused = torch.randn(tokens, 4 + 2 + 2, 24).half()
    q, k, v = fused.split((4, 2, 2), 1)
    v = v.transpose(0, 2).contiguous().transpose(0, 2)
    dout = torch.randn(tokens, 1, 24).half().expand(-1, 4, -1)
    rest = (cu, cu, 70, True, 0.2)
    results = []
    for arguments in ((dout, q, k, v), [x.contiguous() for x in (dout, q, k, v)]):
        out, lse = kernels.attention(*arguments[1:], *rest)
        results.append((out, lse, *kernels.attention_backward(*arguments, out, lse, *rest)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two) and one.is_contiguous()


def test_offsets_beyond_32_bits(far):
    cu = offsets([1, 3])
    near = [torch.randn(4, heads, 24).half() for heads in (4, 4, 2, 2)]
    results = []
    for dout, q, k, v in (near, [far(x) for x in near]):
        out, lse = kernels.attention(q, k, v, cu, cu, 3, True, 0.2)
        results.append(
            (out, lse, *kernels.attention_backward(dout, q, k, v, out, lse, cu, cu, 3, True, 0.2))
        )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_no_tokens():
    empty = torch.empty(0, 4, 16)
    cu = torch.zeros(3, dtype=torch.int32)
    out, lse = kernels.attention(empty, empty, empty, cu, cu, 0, True, 0.25)
    gradients = kernels.attention_backward(
        empty, empty, empty, empty, out, lse, cu, cu, 0, True, 0.25
    )
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)
    assert all(x.shape == (0, 4, 16) for x in gradients)


def test_a_head_too_wide_is_refused():
    q = torch.randn(3, 1, 300)
    with pytest.raises(ValueError, match="q: expected a head dimension of at most 256, got 300"):
        kernels.attention(q, q, q, offsets([3]), offsets([3]), 0, True, 0.1)


def test_sections_cover_every_key_head():
    """Programs are numbered section by section; the last section may be narrower."""
    q = torch.randn(40, 7, 64)
    longest = 2**16 // 2 // (2 * 64 * 4) // 3  # three key heads to a section
    assert kernels._section(q, longest, 7, 7) == 3
    cu = offsets([40])
    out, _ = kernels.attention(q, q, q, cu, cu, longest, True, 0.125)
    expected, _ = reference.attention(q, q, q, cu, cu, 0, True, 0.125)
    torch.testing.assert_close(out, expected)


def test_through_the_ops():
    q, k, v = (torch.randn(20, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for name in ("triton", "reference"):
        with ops.use(name):
            out = ops.attention(q, k, v, offsets([13, 7]))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
