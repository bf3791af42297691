"""Attention in CUDA, emulated, by the rule of `numerics.judge`, and the promises beside it.

Documents are short and heads few, above all in fp32, so that the suite stays within two minutes;
a case of each padded head dimension, with a remainder in every direction, is what counts.
"""

import pytest
import torch
from attention_cases import both_directions, check, offsets
from numerics import same_bits
from strides import columns_first, off_alignment

from llama2rt import ops
from llama2rt.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = [1, 2, 0, 113, 203]
SHORT = [1, 2, 0, 37, 70]
HALF = [torch.bfloat16, torch.float16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.mark.parametrize("dtype", HALF, ids=NAMES.get)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(8, 8, 16), (8, 2, 64), (8, 1, 40), (4, 1, 80), (2, 1, 96), (2, 2, 128)],
)
def test_causal(emulated, heads, kv_heads, dim, dtype, seed):
    check(emulated, heads, kv_heads, dim, dtype, seed, queries=RAGGED)


@pytest.mark.parametrize("dtype", HALF, ids=NAMES.get)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 192), (2, 1, 256)])
def test_wide_heads(emulated, heads, kv_heads, dim, dtype, seed):
    check(emulated, heads, kv_heads, dim, dtype, seed, queries=[1, 2, 0, 113])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 16), (4, 1, 64), (2, 1, 40), (2, 1, 128), (1, 1, 256)]
)
def test_fp32(emulated, heads, kv_heads, dim, seed):
    check(emulated, heads, kv_heads, dim, torch.float32, seed, queries=SHORT)


@pytest.mark.parametrize("dim", [64, 128])
def test_1024_tokens(emulated, dim, seed):
    check(emulated, 1, 1, dim, torch.bfloat16, seed, queries=[1024])


def test_many_heads(emulated, seed):
    check(emulated, 52, 52, 16, torch.bfloat16, seed, queries=SHORT)


def test_not_causal(emulated, dtype, seed):
    check(emulated, 4, 2, 64, dtype, seed, causal=False, queries=SHORT)


@pytest.mark.parametrize("kind", ["small", "tail"])
def test_hard_inputs(emulated, kind, dtype, seed):
    check(emulated, 2, 1, 24, dtype, seed, kind=kind, queries=SHORT)


@pytest.mark.parametrize("dim", [1, 7, 65])
def test_head_dims_that_are_padded(emulated, dim, dtype, seed):
    check(emulated, 2, 1, dim, dtype, seed, queries=[3, 0, 20])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(emulated, causal, dtype, seed):
    """More keys, fewer keys (rows that see none), no keys, no queries, and a group of 3."""
    queries, keys = [3, 70, 5, 0, 9], [190, 37, 0, 4, 9]
    out, lse, *_ = check(emulated, 3, 1, 16, dtype, seed, causal=causal, queries=queries, keys=keys)
    unseen = slice(3, 36) if causal else slice(73, 78)
    assert not out[unseen].any() and (lse[:, unseen] == -torch.inf).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(emulated, scale, dtype, seed):
    check(emulated, 2, 1, 16, dtype, seed, scale=scale, queries=[2, 40])


def test_tiles_are_found_whatever_the_lengths(emulated, seed):
    """Every row of every document is in exactly one tile: out is written, and written once."""
    lengths = torch.randint(0, 90, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths[::7] = [0] * len(lengths[::7])
    lengths[5:8] = [64, 128, 192]
    check(emulated, 1, 1, 16, torch.bfloat16, seed, queries=lengths)


def test_any_strides(emulated, dtype):
    """A fused projection's output, a transposed one, rows off 16 bytes, a gradient of stride 0."""
    cu, tokens = offsets([2, 0, 70]), 72
    fused = torch.randn(tokens, 4 + 2 + 2, 24).to(dtype)
    q, k, v = fused.split((4, 2, 2), 1)
    k, v = off_alignment(k), columns_first(v)
    dout = torch.randn(tokens, 1, 24).to(dtype).expand(-1, 4, -1)
    rest = (cu, cu, 70, True, 0.2)
    dense = [x.contiguous() for x in (dout, q, k, v)]
    ours = both_directions(emulated, dout, q, k, v, *rest)
    assert same_bits(ours, both_directions(emulated, *dense, *rest))
    assert all(x.is_contiguous() for x in ours)


@pytest.mark.parametrize("dim", [64, 256])
def test_the_same_bits_whatever_the_order_of_threads(module, emulated, dim, dtype):
    q, dout = torch.randn(2, 90, 2, dim).to(dtype)
    k, v = torch.randn(2, 90, 1, dim).to(dtype)
    cu = offsets([20, 70])
    results = []
    for order in range(3):
        module.set_seed(order)
        results.append(both_directions(emulated, dout, q, k, v, cu, cu, 0, True, 0.125))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_offsets_of_either_integer(emulated):
    q = torch.randn(30, 2, 16).bfloat16()
    lengths = [10, 0, 20]
    results = [
        both_directions(
            emulated, q, q, q, q, offsets(lengths, one), offsets(lengths, two), 0, True, 1
        )
        for one, two in ((torch.int32, torch.int32), (torch.int64, torch.int32))
    ]
    assert same_bits(*results)


def test_strides_beyond_32_bits(emulated, far, dtype):
    near = [torch.randn(5, heads, 16).to(dtype) for heads in (2, 2, 1, 1)]
    cu = offsets([1, 4])
    results = [
        both_directions(emulated, *tensors, cu, cu, 0, True, 0.25)
        for tensors in (near, [far(x) for x in near])
    ]
    assert same_bits(*results)


def test_no_tokens(emulated):
    empty, keys = torch.empty(0, 4, 16), torch.randn(3, 2, 16)
    cu, cu_k = torch.zeros(3, dtype=torch.int32), offsets([1, 2])
    out, lse, dq, dk, dv = both_directions(
        emulated, empty, empty, keys, keys, cu, cu_k, 0, True, 0.25
    )
    assert out.shape == dq.shape == (0, 4, 16) and lse.shape == (4, 0)
    assert dk.shape == dv.shape == keys.shape and not dk.any() and not dv.any()


def test_a_head_too_wide_is_refused(emulated):
    q = torch.randn(3, 1, 300)
    with pytest.raises(ValueError, match="q: expected a head dimension of at most 256, got 300"):
        emulated.attention(q, q, q, offsets([3]), offsets([3]), 0, True, 0.1)


def test_sections_cover_every_key_head(emulated):
    """Blocks are numbered section by section; the last section may be narrower."""
    q = torch.randn(40, 7, 64)
    longest = 2**16 // 2 // (2 * 64 * 4) // 3  # three key heads to a section
    cu = offsets([40])
    out, _ = emulated.attention(q, q, q, cu, cu, longest, True, 0.125)
    expected, _ = reference.attention(q, q, q, cu, cu, 0, True, 0.125)
    torch.testing.assert_close(out, expected)


def test_through_the_ops(module):
    q, k, v = (torch.randn(20, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for name in ("emulated", "reference"):
        with ops.use(name):
            out = ops.attention(q, k, v, offsets([13, 7]))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
