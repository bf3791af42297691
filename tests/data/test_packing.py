"""Packing against a loop that says the same thing slowly."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data.packing import Example, micro_batches, pack, pack_pairs

example = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=8).map(
    lambda rows: Example.of([t for t, _ in rows], [m for _, m in rows])
)


def slowly(examples):
    tokens, positions, cu_seqlens, targets = [], [], [0], []
    for one in examples:
        for i, token in enumerate(one.tokens):
            tokens.append(int(token))
            positions.append(i)
            last = i + 1 == len(one.tokens)
            targets.append(-1 if last or not one.trainable[i + 1] else int(one.tokens[i + 1]))
        cu_seqlens.append(len(tokens))
    return tokens, positions, cu_seqlens, targets


@given(st.lists(example, min_size=1, max_size=8))
def test_pack_says_what_the_loop_says(examples):
    batch = pack(examples)
    tokens, positions, cu_seqlens, targets = slowly(examples)
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.cu_seqlens.tolist() == cu_seqlens
    assert batch.targets.tolist() == targets
    assert batch.weight == sum(target >= 0 for target in targets)
    assert batch.documents == len(examples)
    types = [batch.tokens.dtype, batch.positions.dtype, batch.cu_seqlens.dtype, batch.targets.dtype]
    assert types == [torch.int64, torch.int32, torch.int32, torch.int64]


@given(st.lists(example, max_size=12), st.integers(1, 30))
def test_micro_batches_lose_nothing_and_split_nothing(examples, max_tokens):
    batches = micro_batches(examples, max_tokens)
    documents = [
        (batch.tokens[a:b].tolist(), batch.targets[a:b].tolist())
        for batch in batches
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]
    alone = [slowly([one]) for one in examples]
    assert documents == [(tokens, targets) for tokens, _, _, targets in alone]
    # A longer document than fits is a batch of its own; all other batches stay within.
    for batch in batches:
        assert len(batch.tokens) <= max_tokens or batch.documents == 1
    # Greedy: a batch was closed only because its successor's first document did not fit.
    for batch, after in pairwise(batches):
        assert len(batch.tokens) + int(after.cu_seqlens[1]) > max_tokens
    assert sum(batch.weight for batch in batches) == sum(
        target >= 0 for _, _, _, targets in alone for target in targets
    )


def test_what_is_longer_than_a_micro_batch_passes_alone():
    short, fits, long = (Example.of(range(n)) for n in (1, 5, 6))
    assert len(micro_batches([fits, fits], 5)) == 2
    for order, sizes in (
        ([long, short, short], [6, 2]),
        ([short, long, short], [1, 6, 1]),
        ([short, short, long], [2, 6]),
        ([long, long], [6, 6]),
    ):
        batches = micro_batches(order, 5)
        assert [len(batch.tokens) for batch in batches] == sizes
        assert sum(batch.documents for batch in batches) == len(order)
    assert micro_batches([], 5) == []


def test_everything_is_trainable_by_default_but_the_first_token_has_no_predecessor():
    batch = pack([Example.of([5, 6, 7]), Example.of([8])])
    assert batch.targets.tolist() == [6, 7, -1, -1]
    assert batch.weight == 2


def test_pairs_lie_side_by_side():
    pairs = [(Example.of([1, 2]), Example.of([3])), (Example.of([4]), Example.of([5, 6, 7]))]
    batch = pack_pairs(pairs, {"margin": [1.0, 2 / 3], "rating": np.array([0, 1])})
    assert batch.batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.batch.cu_seqlens.tolist() == [0, 2, 3, 4, 7]
    assert batch.weight == 2
    assert batch.extras["margin"].dtype == torch.float32
    torch.testing.assert_close(batch.extras["margin"], torch.tensor([1.0, 2 / 3]))
    assert batch.extras["rating"].tolist() == [0, 1]
    moved = batch.to("cpu")
    assert moved.weight == 2
    assert moved.extras.keys() == batch.extras.keys()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"extras\['margin'\]: expected 1 rows"):
        pack_pairs([(Example.of([1]), Example.of([2]))], {"margin": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"trainable: expected shape \(2,\), got \(3,\)"):
        Example.of([1, 2], [True] * 3)
    with pytest.raises(ValueError, match="examples: expected at least one"):
        pack([])
