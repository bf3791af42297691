"""decode_attention in CUDA, emulated, by the rule of `numerics.judge`, and what it may not do.

The yardstick and the inputs are in `decode_cases`.
"""

import emulator
import pytest
import torch
from attention_cases import offsets
from decode_cases import RAGGED, check, make
from strides import columns_first, heads_first, off_alignment, rows_apart

from llama2rt import ops
from llama2rt.ops import cuda_kernels
from llama2rt.ops.cuda_kernels import decode_attention as calls

pytestmark = pytest.mark.usefixtures("poisoned")

# One tile of a warp, one of a block and a bit, more than a ring holds; 0 is legal.
LENGTHS = [1, 0, 17, 113, 300]


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n} splits")
def splits(request, monkeypatch):
    """That many splits, the last ones empty for short sequences."""
    monkeypatch.setattr(calls, "split_count", lambda items, capacity, slots: request.param)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    # Narrow; a remainder of the head dimension; the shape of LLaMA's models; the widest.
    [(8, 8, 16, 16), (8, 2, 80, 7), (8, 1, 128, 32), (2, 1, 256, 16)],
)
def test_numerics(emulated, heads, kv_heads, dim, page, splits, dtype, seed):
    check(
        emulated.decode_attention,
        make(heads, kv_heads, dim, page, dtype, "normal", seed, LENGTHS),
        dim**-0.5,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"), [(2, 2, 16, 16), (6, 2, 72, 7), (8, 1, 128, 32)]
)
def test_several_queries_a_sequence(emulated, heads, kv_heads, dim, page, splits, dtype, seed):
    arguments = make(heads, kv_heads, dim, page, dtype, "normal", seed, **RAGGED)
    check(emulated.decode_attention, arguments, dim**-0.5, queries=RAGGED["queries"])


@pytest.mark.parametrize("kind", ["small", "tail", "offset"])
def test_hard_inputs(emulated, kind, splits, dtype, seed):
    check(emulated.decode_attention, make(2, 1, 24, 16, dtype, kind, seed, LENGTHS), 0.2)


@pytest.mark.parametrize("dim", [17, 67])
def test_rows_that_are_not_aligned(emulated, dim, splits, dtype, seed):
    check(emulated.decode_attention, make(2, 1, dim, 16, dtype, "normal", seed, [70, 0, 5]), 0.2)


@pytest.mark.parametrize("scale", [0.25, -0.3, 0.0])
def test_groups_larger_than_a_tile(emulated, scale, dtype, seed):
    check(emulated.decode_attention, make(42, 2, 16, 16, dtype, "normal", seed, [0, 3, 70]), scale)


def test_more_splits_than_warps_of_the_second_stage(emulated, dtype, seed, monkeypatch):
    monkeypatch.setattr(calls, "split_count", lambda items, capacity, slots: 40)
    check(emulated.decode_attention, make(2, 1, 16, 16, dtype, "normal", seed, [0, 1300]), 0.25)


def test_any_strides(emulated, splits, dtype):
    q, k, v, table, lengths = make(8, 2, 24, 16, dtype, "normal", 0, LENGTHS)
    expected = emulated.decode_attention(q, k, v, table, lengths, 0.2)
    q_apart = torch.cat((q, q), 1)[:, :8]
    both = torch.stack((k, v), 2)  # keys beside values in each slot
    indices = rows_apart(table).long(), lengths.long()
    for values in (heads_first(both[:, :, 1]), off_alignment(v), columns_first(v)):
        got = emulated.decode_attention(q_apart, both[:, :, 0], values, *indices, 0.2)
        assert torch.equal(got, expected)
    cu_q = offsets([2, 0, 1, 0, 2])
    expected = emulated.decode_attention(q, k, v, table, lengths, 0.2, cu_q)
    arguments = q_apart, both[:, :, 0], off_alignment(v), *indices, 0.2, cu_q.long()
    assert torch.equal(emulated.decode_attention(*arguments), expected)


def test_the_order_of_threads_does_not_matter(module, emulated, splits, dtype):
    arguments = make(8, 2, 80, 16, dtype, "normal", 0, LENGTHS)
    for cu_q in (None, offsets([0, 2, 0, 3, 0])):
        results = []
        for seed in range(4):
            module.set_seed(seed)
            results.append(emulated.decode_attention(*arguments, 0.2, cu_q))
        assert all(torch.equal(results[0], other) for other in results)


def test_no_sequences_and_no_pages(emulated):
    cache, q = torch.empty(0, 16, 2, 16), torch.randn(2, 4, 16)
    table, lengths = torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert not emulated.decode_attention(q, cache, cache, table, lengths, 0.25).any()
    none = emulated.decode_attention(q[:0], cache, cache, table[:0], lengths[:0], 0.25)
    assert none.shape == (0, 4, 16)
    none = emulated.decode_attention(q[:0], cache, cache, table, lengths, 0.25, offsets([0, 0]))
    assert none.shape == (0, 4, 16)


def test_a_head_too_wide_is_refused(emulated):
    q, cache = torch.zeros(1, 1, 264), torch.zeros(1, 16, 1, 264)
    with pytest.raises(ValueError, match="at most 256, got 264"):
        emulated.decode_attention(q, cache, cache, torch.zeros(1, 1).int(), torch.ones(1), 1.0)


def test_how_many_splits():
    """One wave of blocks at most, none shorter than worth its cost, at least one."""
    slots = 2 * 132
    assert calls.split_count(1, 4096, slots) == 64  # tokens each
    assert calls.split_count(8, 2**20, slots) == 33
    assert calls.split_count(100, 2**20, slots) == 2  # three would start a second wave
    assert calls.split_count(1000, 2**20, slots) == calls.split_count(1, 1, slots) == 1


@pytest.mark.parametrize(("context", "splits", "with_keys"), [(700, 7, 6), (700, 4, 4), (65, 2, 2)])
def test_splits_are_whole_tiles_of_keys(module, monkeypatch, context, splits, with_keys):
    """Of 700 tokens a seventh is 100, in whole tiles 128: the last of seven splits has none."""
    monkeypatch.setattr(calls, "split_count", lambda *_: splits)
    seen = []

    class Recording(emulator.Checked):
        def hand_over(self, arguments):
            seen.extend(x for x in arguments if isinstance(x, torch.Tensor))
            super().hand_over(arguments)

    device = emulator.Emulated(module)
    device.native = Recording(module)
    q, k, v, table, lengths = make(4, 2, 16, 16, torch.bfloat16, "normal", 0, [context])
    functions = cuda_kernels.on(device)
    functions["decode_attention"](q, k, v, table, lengths, 0.25)
    (lse,) = (x for x in seen if x.shape == (splits, 1, 4))
    assert (lse > -torch.inf).all(2).flatten().tolist() == [i < with_keys for i in range(splits)]
    share = -(-context // (splits * calls.SHORTEST_SPLIT)) * calls.SHORTEST_SPLIT
    assert with_keys == -(-context // share)


def test_through_the_ops(module):
    q, k, v, table, lengths = make(8, 2, 16, 16, torch.float32, "normal", 0, LENGTHS)
    results = []
    for name in ("emulated", "reference"):
        with ops.use(name):
            results.append(ops.decode_attention(q, k, v, table, lengths))
    torch.testing.assert_close(*results)
