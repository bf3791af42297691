"""Attention of `_cuda` by Hopper's own instructions, by the rule of `numerics.judge`.

What is tested on the emulator (tests/emulator/test_attention_sm90.py) is tested here on what it
stands in for, with documents of several thousand tokens beside short ones. Not yet run on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from attention_cases import both_directions, check, offsets
from numerics import same_bits

RAGGED = [1, 2, 0, 113, 203, 1024]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def hopper(cuda, poisoned):
    """The functions under test; skips elsewhere."""
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        pytest.skip(f"needs compute capability 9.0, this GPU has {capability}")
    return SimpleNamespace(
        attention=cuda.attention_sm90, attention_backward=cuda.attention_sm90_backward
    )


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (52, 52)])
def test_ragged(hopper, heads, kv_heads, dim, causal, dtype, seed):
    check(hopper, heads, kv_heads, dim, dtype, seed, causal=causal, queries=RAGGED, device="cuda")


@pytest.mark.parametrize("kind", ["small", "tail"])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_documents(hopper, dim, kind, seed):
    """Rings that turn many times, and blocks enough to fill the GPU more than once."""
    queries = [4096, 5, 3000]
    check(hopper, 8, 2, dim, torch.bfloat16, seed, kind=kind, queries=queries, device="cuda")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(hopper, causal, seed):
    queries, keys = [3, 70, 200, 5, 0, 9, 1], [190, 37, 20, 0, 4, 9, 3000]
    check(
        *(hopper, 4, 2, 128, torch.bfloat16, seed),
        causal=causal,
        queries=queries,
        keys=keys,
        device="cuda",
    )


def test_repeatable(hopper):
    cu = offsets([700, 3000, 1]).cuda()
    tensors = torch.randn(4, 3701, 8, 128, device="cuda").bfloat16().unbind()
    arguments = (*tensors, cu, cu, 3000, True, 128**-0.5)
    first = both_directions(hopper, *arguments)
    for _ in range(20):
        assert same_bits(both_directions(hopper, *arguments), first)


def test_documents_never_see_each_other(hopper):
    cu = offsets([113, 130, 20]).cuda()
    q, k, v = torch.randn(3, 263, 1, 128, device="cuda").bfloat16().unbind()
    clean, _ = hopper.attention(q, k, v, cu, cu, 0, True, 0.1)
    for x in (q, k, v):
        x[113:243] = torch.nan
    out, _ = hopper.attention(q, k, v, cu, cu, 0, True, 0.1)
    assert torch.equal(out[:113], clean[:113]) and torch.equal(out[243:], clean[243:])


def test_inside_a_cuda_graph(hopper):
    """Tensor maps are parameters of the launch, so a graph keeps them."""
    cu = offsets([100, 200]).cuda()
    q, k, v = torch.randn(3, 300, 4, 64, device="cuda").half().unbind()
    expected, _ = hopper.attention(q, k, v, cu, cu, 0, True, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = hopper.attention(q, k, v, cu, cu, 0, True, 0.125)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)
