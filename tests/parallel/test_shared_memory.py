"""Collectives through shared memory give what gloo gives, and are used where memory is shared."""

import pytest
import torch
from shared_memory_ranks import (
    PIECE,
    compare_with_gloo,
    gradients,
    where_memory_is_not_shared,
)

from llama2rt.parallel import ParallelOptions

# fp32 elements of a piece; what fills pieces exactly, and what does not.
FULL = PIECE // 4
COUNTS = [1, 3, FULL - 1, FULL, FULL + 1, 2 * FULL, 5 * FULL + 7, 2]


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_give_what_gloo_gives(on_ranks, ranks):
    for same in on_ranks(ranks, compare_with_gloo, COUNTS):
        assert len(same) == 3 * len(COUNTS)
        assert all(same.values()), [name for name, equal in same.items() if not equal]


def test_ranks_that_cannot_share_memory_keep_to_gloo(on_ranks):
    assert on_ranks(2, where_memory_is_not_shared) == [[None, None]] * 2


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, ParallelOptions()), (4, ParallelOptions(data=2, shard=2)), (4, ParallelOptions())],
)
def test_a_sharded_model_has_the_gradients_that_it_has_by_gloo(on_ranks, ranks, options):
    by_gloo = on_ranks(ranks, gradients, options, False)
    by_memory = on_ranks(ranks, gradients, options, True)
    for (expected, default), (found, classes) in zip(by_gloo, by_memory, strict=True):
        assert default == ["DefaultAllGather", "DefaultReduceScatter"]
        assert classes == ["SharedAllGather", "SharedReduceScatter"]
        for one, other in zip(expected, found, strict=True):
            if ranks == 2 or options.data == 2:  # two terms have one sum
                assert one.equal(other)
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
