"""decode_attention in Triton, interpreted, by the rule of `numerics.judge`, and what it may not do.

The yardstick and the inputs are in `decode_cases`.
"""

import pytest
import torch
from attention_cases import offsets
from decode_cases import RAGGED, check, make
from strides import heads_first, rows_apart

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt import ops
from llama2rt.kernels import decode_attention as kernels
from llama2rt.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

LENGTHS = [1, 2, 0, 17, 113]


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n} splits")
def splits(request, monkeypatch):
    """That many splits, the last ones empty for short sequences."""
    monkeypatch.setattr(kernels, "split_count", lambda items, capacity, slots: request.param)
    monkeypatch.setattr(kernels, "LAUNCH", {80: kernels.Launch(programs=1, tile_bytes=8192)})


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"), [(4, 4, 16, 16), (4, 1, 80, 7), (8, 1, 64, 32)]
)
def test_numerics(heads, kv_heads, dim, page, splits, dtype, seed):
    arguments = make(heads, kv_heads, dim, page, dtype, "normal", seed, LENGTHS)
    check(kernels.decode_attention, arguments, dim**-0.5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"), [(2, 2, 16, 16), (6, 2, 24, 7), (8, 1, 80, 32)]
)
def test_several_queries_a_sequence(heads, kv_heads, dim, page, splits, dtype, seed):
    arguments = make(heads, kv_heads, dim, page, dtype, "normal", seed, **RAGGED)
    check(kernels.decode_attention, arguments, dim**-0.5, queries=RAGGED["queries"])


@pytest.mark.parametrize("kind", ["small", "tail", "offset"])
def test_hard_inputs(kind, splits, dtype, seed):
    check(kernels.decode_attention, make(2, 1, 24, 16, dtype, kind, seed, LENGTHS), 0.2)


def test_more_than_16_queries_to_a_key(seed):
    arguments = make(40, 2, 16, 16, torch.float32, "normal", seed, LENGTHS)
    for scale in (0.25, -0.3, 0.0):
        expected = reference.decode_attention(*arguments, scale)
        torch.testing.assert_close(kernels.decode_attention(*arguments, scale), expected)


def test_more_splits_than_are_combined_at_once(seed, monkeypatch):
    monkeypatch.setattr(kernels, "split_count", lambda items, capacity, slots: 20)
    monkeypatch.setattr(kernels, "LAUNCH", {80: kernels.Launch(programs=1, tile_bytes=1)})
    arguments = make(2, 1, 16, 16, torch.float32, "normal", seed, [0, 300])
    expected = reference.decode_attention(*arguments, 0.25)
    torch.testing.assert_close(kernels.decode_attention(*arguments, 0.25), expected)


def test_any_strides(splits):
    q, k, v, table, lengths = make(8, 2, 24, 16, torch.float16, "normal", 0, LENGTHS)
    expected = kernels.decode_attention(q, k, v, table, lengths, 0.2)
    q_apart = torch.cat((q, q), 1)[:, :8]
    both = torch.stack((k, v), 2)  # keys beside values in each slot
    values, apart = heads_first(both[:, :, 1]), rows_apart(table)
    got = kernels.decode_attention(q_apart, both[:, :, 0], values, apart, lengths.long(), 0.2)
    assert torch.equal(got, expected)
    cu_q = offsets([2, 0, 1, 0, 2])
    expected = kernels.decode_attention(q, k, v, table, lengths, 0.2, cu_q)
    arguments = q_apart, both[:, :, 0], values, apart, lengths.long(), 0.2, cu_q.long()
    assert torch.equal(kernels.decode_attention(*arguments), expected)


def test_offsets_beyond_32_bits(splits, far):
    """Pages 2^30 elements apart."""
    q, k, v, table, lengths = make(4, 2, 24, 16, torch.float16, "normal", 0, lengths=[0, 17, 33])
    expected = kernels.decode_attention(q, k, v, table, lengths, 0.2)
    got = kernels.decode_attention(far(q), far(k), far(v), table, lengths, 0.2)
    assert torch.equal(got, expected)


def test_no_sequences_and_no_pages():
    cache, q = torch.empty(0, 16, 2, 16), torch.randn(2, 4, 16)
    table, lengths = torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert not kernels.decode_attention(q, cache, cache, table, lengths, 0.25).any()
    none = kernels.decode_attention(q[:0], cache, cache, table[:0], lengths[:0], 0.25)
    assert none.shape == (0, 4, 16)
    none = kernels.decode_attention(q[:0], cache, cache, table, lengths, 0.25, offsets([0, 0]))
    assert none.shape == (0, 4, 16)


def test_how_many_rows_a_tile_has():
    """As many as its queries fill; of wide rows no more than registers hold."""
    rows = kernels.tile_rows
    assert rows(1, 1, 64, 2) == 16 and rows(20, 1, 64, 2) == rows(20, 1, 64, 4) == 32
    assert rows(4, 4.5, 64, 2) == 32
    assert rows(8, 256, 64, 2) == rows(80, 2, 64, 2) == 64
    assert rows(8, 256, 128, 2) == 32 and rows(8, 256, 64, 4) == 16


def test_how_many_splits():
    """One wave of programs at most, none shorter than worth its cost, at least one."""
    slots = 2 * 132
    assert kernels.split_count(1, 4096, slots) == 16  # 256 tokens each
    assert kernels.split_count(8, 2**20, slots) == 33
    assert kernels.split_count(100, 2**20, slots) == 2  # three would start a second wave
    assert kernels.split_count(1000, 2**20, slots) == kernels.split_count(1, 1, slots) == 1


def test_through_the_ops():
    q, k, v, table, lengths = make(8, 2, 16, 16, torch.float32, "normal", 0, LENGTHS)
    results = []
    for name in ("triton", "reference"):
        with ops.use(name):
            results.append(ops.decode_attention(q, k, v, table, lengths))
    torch.testing.assert_close(*results)
