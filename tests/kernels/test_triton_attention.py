"""Attention in Triton, interpreted, by the rule of `numerics.judge`, and the promises beside it.

The yardstick, the formula in plain torch, and the inputs are in `attention_cases`.
"""

import attention_cases
import pytest
import torch
from attention_cases import both_directions, offsets, softmax_attention
from numerics import same_bits
from strides import columns_first

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt import ops
from llama2rt.kernels import attention, attention_backward
from llama2rt.ops import reference
from llama2rt.ops import triton as kernels

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

RAGGED = [1, 2, 0, 17, 113]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles to a document of 113 tokens, full ones and cut ones; rows and keys differ."""
    for module, name, rows, keys in (
        (attention, "FORWARD", 64, 32),
        (attention_backward, "DQ", 32, 64),
        (attention_backward, "DKDV", 64, 32),
    ):
        launch = attention.Launch(rows, keys, 4, 1)
        monkeypatch.setattr(module, name, {80: dict.fromkeys((64, 128, 256), launch)})
    exact = dict.fromkeys((64, 128, 256), attention.Launch(32, 64, 4, 1))
    monkeypatch.setattr(attention, "EXACT", exact)


def check(heads, kv_heads, dim, dtype, seed, *, queries=RAGGED, kind="normal", **case):
    # The interpreter rounds the product in exp2(scores * scale - row_max), which a GPU fuses with
    # the subtraction: in fp32 that shows where scores are large, so there only v has heavy columns.
    exact_tail = (kind, dtype) == ("tail", torch.float32)
    attention_cases.check(
        *(kernels, heads, kv_heads, dim, dtype, seed),
        queries=queries,
        kind=kind,
        query_kind="normal" if exact_tail else kind,
        yardstick=softmax_attention,
        **case,
    )


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (4, 1, 80), (8, 1, 64)])
def test_causal(heads, kv_heads, dim, dtype, seed):
    check(heads, kv_heads, dim, dtype, seed)


def test_not_causal(dtype, seed):
    check(4, 1, 16, dtype, seed, causal=False)


@pytest.mark.parametrize("kind", ["small", "tail"])
def test_hard_inputs(kind, dtype, seed):
    check(2, 1, 24, dtype, seed, kind=kind)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(causal, seed):
    """More keys, fewer keys (rows that see none), no keys, no queries, and a group of 3."""
    queries, keys = [3, 70, 5, 0, 9], [90, 37, 0, 4, 9]
    check(3, 1, 16, torch.float32, seed, causal=causal, queries=queries, keys=keys)


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
    v = columns_first(v)
    dout = torch.randn(tokens, 1, 24).half().expand(-1, 4, -1)
    rest = (cu, cu, 70, True, 0.2)
    dense = [x.contiguous() for x in (dout, q, k, v)]
    ours = both_directions(kernels, dout, q, k, v, *rest)
    assert same_bits(ours, both_directions(kernels, *dense, *rest))
    assert all(x.is_contiguous() for x in ours)


def test_offsets_beyond_32_bits(far):
    cu = offsets([1, 3])
    near = [torch.randn(4, heads, 24).half() for heads in (4, 4, 2, 2)]
    results = [
        both_directions(kernels, *tensors, cu, cu, 3, True, 0.2)
        for tensors in (near, [far(x) for x in near])
    ]
    assert same_bits(*results)


def test_no_tokens():
    empty = torch.empty(0, 4, 16)
    cu = torch.zeros(3, dtype=torch.int32)
    out, lse, *gradients = both_directions(kernels, *[empty] * 4, cu, cu, 0, True, 0.25)
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
    assert attention.section_for(q, longest, 7, 7) == 3
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
