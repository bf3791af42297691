"""token_logprob over ranks that each have a part of the vocabulary is the op of one process."""

import pytest
import torch
from sharded_ops import FIRST, refused, rows_and_vocabulary, vocabulary, vocabulary_memory

from llama2rt import ops


# 301 tokens on 2 or 4 ranks: the last has fewer.
@pytest.mark.parametrize(("ranks", "backend"), [(2, "reference"), (4, "cpu")])
def test_it_is_the_op_of_the_whole_vocabulary(on_ranks, ranks, backend):
    if backend == "cpu" and "cpu" not in ops.backends()["token_logprob"]["native"]:
        backend = "reference"
    for distances in on_ranks(ranks, vocabulary, ranks, (37, 301, 16), backend):
        assert len(distances) == 14 and max(distances.values()) < 2e-6, distances


def test_hidden_cut_by_tokens_is_gathered(on_ranks):
    mode = {"hidden": (FIRST,)}
    for distances in on_ranks(2, vocabulary, 2, (37, 301, 16), "reference", mode):
        assert len(distances) == 7 and max(distances.values()) < 2e-6, distances


def test_bf16(on_ranks):
    mode = {"dtype": torch.bfloat16}
    for distances in on_ranks(2, vocabulary, 2, (37, 301, 16), "reference", mode):
        assert max(distances.values()) < 2**-7, distances


def test_tokens_may_be_cut_along_another_dimension(on_ranks):
    for distances in on_ranks(4, rows_and_vocabulary):
        assert max(distances.values()) < 2e-6, distances


def test_no_rank_holds_logits(on_ranks):
    shape = tokens, words, _ = 2048, 32000, 32
    for forward, step in on_ranks(2, vocabulary_memory, 2, shape):
        assert 0 < forward <= 4 * tokens * words / 8
        assert 0 < step <= 4 * tokens * words / 8


def test_a_weight_cut_twice_is_refused_by_name(on_ranks):
    assert all(
        "token_logprob: expected a weight whose rows" in said for said in on_ranks(4, refused)
    )
