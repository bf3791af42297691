"""Attention of `_cuda` on a GPU, by the rule of `numerics.judge`, and the promises beside it.

Yardstick in the same dtype: torch's own attention (SDPA), one document at a time. Not yet run on a
GPU; tests/emulator runs the same kernels without one.
"""

import pytest
import torch
from attention_cases import both_directions, check, offsets
from numerics import same_bits

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = [1, 2, 0, 113, 203, 1024]


def normal(*shape):
    return torch.randn(shape, device="cuda").bfloat16()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (52, 52)])
def test_numerics(cuda, heads, kv_heads, dim, dtype, causal, seed):
    check(cuda, heads, kv_heads, dim, dtype, seed, queries=LENGTHS, causal=causal, device="cuda")


@pytest.mark.parametrize("kind", ["small", "tail"])
def test_hard_inputs(cuda, kind, dtype, seed):
    check(cuda, 8, 2, 128, dtype, seed, kind=kind, queries=LENGTHS, device="cuda")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(cuda, causal, dtype, seed):
    queries, keys = [3, 270, 5, 0, 9], [390, 137, 0, 4, 9]
    check(*(cuda, 6, 2, 64, dtype, seed), causal=causal, queries=queries, keys=keys, device="cuda")


@pytest.mark.parametrize("dim", [64, 128])
def test_the_same_bits_again(cuda, dim):
    dout, q = normal(2, 5000, 8, dim)
    k, v = normal(2, 5000, 2, dim)
    cu = offsets([4000, 1, 0, 999]).cuda()
    arguments = (dout, q, k, v, cu, cu, 4000, True, dim**-0.5)
    first = both_directions(cuda, *arguments)
    for _ in range(10):
        assert same_bits(both_directions(cuda, *arguments), first)


def test_captured_in_a_graph(cuda):
    """No synchronisation and no work of the host between kernels: other lengths may be replayed."""
    q, dout = normal(2, 300, 4, 64)
    k, v = normal(2, 300, 2, 64)
    cu = offsets([100, 0, 200]).cuda()
    rest = (cu, cu, 0, True, 0.125)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_directions(cuda, dout, q, k, v, *rest)  # loads the kernels
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_directions(cuda, dout, q, k, v, *rest)
    cu.copy_(offsets([7, 290, 3]))
    q.copy_(normal(300, 4, 64))
    graph.replay()
    assert same_bits(captured, both_directions(cuda, dout, q, k, v, *rest))


def test_runs_on_the_current_stream(cuda):
    q = normal(3000, 8, 64)
    cu = offsets([3000]).cuda()
    rest = (cu, cu, 0, True, 0.125)
    expected = both_directions(cuda, q, q, q, q, *rest)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(q)
        results = both_directions(cuda, late, late, late, late, *rest)
    stream.synchronize()
    assert same_bits(results, expected)


def test_offsets_beyond_32_bits(cuda):
    """Keys and queries past the first 2^31 elements of one tensor give what they give alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory is free")
    tokens = 2**31 // (16 * 128) + 300
    q = torch.zeros(tokens, 16, 128, dtype=torch.bfloat16, device="cuda")
    q[-300:] = normal(300, 16, 128)
    far, near = offsets([tokens - 300, 300]).cuda(), offsets([300]).cuda()
    results = [
        cuda.attention(x, x, x, cu, cu, 0, False, 0.1)[0][-300:]
        for x, cu in ((q, far), (q[-300:].clone(), near))
    ]
    assert same_bits(*results)
