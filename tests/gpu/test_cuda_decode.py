"""decode_attention of `_cuda` at the sizes it is made for. Not yet run on a GPU.

The yardstick and the inputs are in `decode_cases`.
"""

import pytest
import torch
from attention_cases import offsets
from decode_cases import RAGGED, check, make

from llama2rt import ops

pytestmark = pytest.mark.usefixtures("cuda")
LENGTHS = [1, 0, 17, 4000, 1113, 64]


def on_gpu(arguments):
    return tuple(x.cuda() for x in arguments)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    [(32, 32, 128, 16), (64, 8, 128, 256), (8, 1, 64, 32), (4, 2, 256, 16), (6, 2, 67, 7)],
)
@pytest.mark.parametrize("kind", ["normal", "tail", "offset"])
def test_numerics(cuda, heads, kv_heads, dim, page, kind, dtype, seed):
    arguments = on_gpu(make(heads, kv_heads, dim, page, dtype, kind, seed, LENGTHS))
    check(cuda.decode_attention, arguments, dim**-0.5)


# As chunked prefill, speculation and decoding bring them; and every edge.
CHUNKED = {"queries": [300, 1, 5, 0, 8, 64], "lengths": [2300, 900, 4000, 17, 8, 1000]}


@pytest.mark.parametrize("ragged", [RAGGED, CHUNKED], ids=["edges", "chunked"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    [(32, 32, 128, 16), (64, 8, 128, 256), (8, 1, 64, 32), (4, 2, 256, 16), (6, 2, 67, 7)],
)
def test_several_queries_a_sequence(cuda, heads, kv_heads, dim, page, ragged, dtype, seed):
    arguments = on_gpu(make(heads, kv_heads, dim, page, dtype, "normal", seed, **ragged))
    check(cuda.decode_attention, arguments, dim**-0.5, queries=ragged["queries"])
    cu_q = offsets(ragged["queries"]).cuda()
    first, second = (cuda.decode_attention(*arguments, 0.1, cu_q) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("sequences", [1, 256])
def test_batches_of_any_size(cuda, sequences, seed):
    lengths = torch.randint(0, 900, (sequences,)).tolist()
    lengths[0] = 900
    arguments = on_gpu(make(8, 2, 128, 16, torch.bfloat16, "normal", seed, lengths))
    check(cuda.decode_attention, arguments, 128**-0.5)
    first, second = (cuda.decode_attention(*arguments, 0.1) for _ in range(2))
    assert torch.equal(first, second)


def test_offsets_beyond_32_bits(cuda):
    """The last page of a cache of 2^31 elements and some more, 8 GiB for keys and values."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of GPU memory is free")
    pages = 2**31 // (16 * 8 * 128) + 1
    k, v = torch.zeros(2, pages, 16, 8, 128, dtype=torch.bfloat16, device="cuda").unbind()
    v[-1] = torch.randn_like(v[-1])
    q = torch.randn(1, 8, 128, device="cuda").bfloat16()
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    out = cuda.decode_attention(q, k, v, table, torch.tensor([1], device="cuda"), 0.1)
    assert torch.equal(out[0], v[-1, 0])


def test_in_a_cuda_graph(cuda):
    """Nothing waits for the device, and lengths may change between replays."""
    q, k, v, table, lengths = on_gpu(make(8, 2, 128, 16, torch.bfloat16, "normal", 0, LENGTHS))
    cuda.decode_attention(q, k, v, table, lengths, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.decode_attention(q, k, v, table, lengths, 0.1)
    lengths.copy_(lengths // 2)
    graph.replay()
    assert torch.equal(out, cuda.decode_attention(q, k, v, table, lengths, 0.1))


def test_numbers_of_queries_may_change_between_replays_of_a_graph(cuda):
    q, k, v, table, lengths = on_gpu(make(8, 2, 128, 16, torch.bfloat16, "normal", 0, LENGTHS))
    cu_q = offsets([1, 0, 2, 3, 0, 0]).cuda()
    cuda.decode_attention(q, k, v, table, lengths, 0.1, cu_q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.decode_attention(q, k, v, table, lengths, 0.1, cu_q)
    cu_q.copy_(offsets([0, 0, 1, 1, 2, 2]))
    graph.replay()
    assert torch.equal(out, cuda.decode_attention(q, k, v, table, lengths, 0.1, cu_q))


def test_runs_where_it_is_asked_for():
    arguments = on_gpu(make(8, 2, 64, 16, torch.float32, "normal", 0, LENGTHS))
    results = []
    for name in ("cuda", "reference"):
        with ops.use(name):
            results.append(ops.decode_attention(*arguments))
    torch.testing.assert_close(*results)
