"""What a batch of documents that share tokens holds, against the documents themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data.packing import Example, micro_batches, pack, pack_pairs
from llama2rt.data.shared import pack_shared, packing

# Two tokens, so that neighbours often begin alike.
example = st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=8).map(
    lambda rows: Example.of([t for t, _ in rows], [m for _, m in rows])
)


def answers(prompt, *texts):
    """One prompt with several answers, which are the targets."""
    return [
        Example.of([*prompt, *text], [False] * len(prompt) + [True] * len(text)) for text in texts
    ]


@given(st.lists(example, min_size=1, max_size=8))
def test_documents_are_whole_through_their_keys(examples):
    batch, whole = pack_shared(examples), pack(examples)
    assert batch.weight == whole.weight
    assert batch.documents == whole.documents
    # Targets, and the tokens that predict them, in the same order: none is shared, none lost.
    for name in ("tokens", "positions", "targets"):
        kept = getattr(batch, name)[batch.targets >= 0]
        assert kept.tolist() == getattr(whole, name)[whole.targets >= 0].tolist()
    if batch.keys is None:
        assert batch.tokens.tolist() == whole.tokens.tolist()
        return
    rows, offsets = batch.keys.rows, batch.keys.cu_seqlens.tolist()
    types = [batch.positions.dtype, rows.dtype, batch.keys.cu_seqlens.dtype]
    assert types == [torch.int32, torch.int64, torch.int32]
    assert offsets == whole.cu_seqlens.tolist()
    assert batch.tokens[rows].tolist() == whole.tokens.tolist()
    assert batch.positions[rows].tolist() == whole.positions.tolist()
    for index, one in enumerate(examples):
        own = list(range(*batch.cu_seqlens[index : index + 2].tolist()))
        of_document = rows[offsets[index] : offsets[index + 1]].tolist()
        assert bool(own) == bool(len(one.tokens))  # the last token is its own
        assert of_document[len(of_document) - len(own) :] == own


def test_an_answer_leaves_its_prompt_to_the_one_before_it():
    batch = pack_shared(answers([1, 5, 6, 7], [8, 9], [3], [4, 4]))
    # The prompt's last token predicts each answer's first.
    assert batch.tokens.tolist() == [1, 5, 6, 7, 8, 9, 7, 3, 7, 4, 4]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5]
    assert batch.targets.tolist() == [-1, -1, -1, 8, 9, -1, 3, -1, 4, 4, -1]
    assert batch.cu_seqlens.tolist() == [0, 6, 8, 11]
    assert batch.keys.cu_seqlens.tolist() == [0, 6, 11, 17]
    assert batch.keys.rows.tolist()[6:] == [0, 1, 2, 6, 7, 0, 1, 2, 8, 9, 10]


def test_answers_that_begin_alike_share_no_target():
    batch = pack_shared(answers([1, 5, 6, 7], [8, 9, 3], [8, 9, 4]))
    assert batch.tokens.tolist() == [1, 5, 6, 7, 8, 9, 3, 7, 8, 9, 4]
    # Where nothing is predicted, they do.
    untrained = [Example.of(one.tokens, [False] * 7) for one in answers([1, 5], [8, 9, 3, 3, 4])]
    untrained += [Example.of([1, 5, 8, 9, 3, 3, 5], [False] * 7)] * 2
    assert pack_shared(untrained).tokens.tolist() == [1, 5, 8, 9, 3, 3, 4, 5, 5]


def test_documents_that_share_little_stay_whole():
    long, other = ([1, *np.arange(first, first + 30)] for first in (2, 40))
    assert pack_shared([Example.of(long), Example.of(other)]).keys is None
    assert pack_shared([Example.of([])]).keys is None
    with pytest.raises(ValueError, match="at least one"):
        pack_shared([])


def test_a_recipe_may_ask_for_sharing_or_forbid_it():
    little = answers([1, 5], np.arange(2, 30), np.arange(40, 60))  # one token of fifty
    much = answers([1, 5, 6, 7], [8, 9], [3])
    shared = {
        share: [packing(share)(examples).keys is not None for examples in (little, much)]
        for share in (None, True, False)
    }
    assert shared == {None: [False, True], True: [True, True], False: [False, False]}
    nothing = answers([1], [2], [3])
    assert packing(True)(nothing).keys is None


def test_micro_batches_hold_the_same_documents():
    examples = answers([1, 5, 6, 7], [8], [9], [3], [4]) + answers([1, 2, 3], [4], [5])
    whole, shared = micro_batches(examples, 12), micro_batches(examples, 12, pack_shared)
    assert [batch.documents for batch in shared] == [batch.documents for batch in whole]
    assert sum(len(batch.tokens) for batch in shared) < sum(len(batch.tokens) for batch in whole)


def test_pairs_that_share_move_together():
    chosen, rejected = answers([1, 5, 6, 7], [8, 9], [3])
    pairs = pack_pairs([(chosen, rejected)], {"margin": [1.0]}, pack_shared)
    moved = pairs.to("meta").batch
    assert moved.keys.rows.is_meta and moved.keys.cu_seqlens.is_meta
    assert pairs.weight == 1 and pairs.batch.documents == 2
