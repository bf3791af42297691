"""Ranks that hold a policy together, each a part of every matrix, sample one process's samples."""

import numpy as np
import pytest
from parallel_sampling import refused, sampled

from llama2rt.parallel import ParallelOptions


@pytest.mark.parametrize(
    ("ranks", "options", "kv_heads", "tied"),
    [
        (2, ParallelOptions(tensor=2), 2, False),
        (4, ParallelOptions(tensor=2), 4, True),
        (4, ParallelOptions(tensor=2, context=2), 2, False),
    ],
    ids=["tensor-2", "shard-2-tensor-2-tied", "context-2-tensor-2"],
)
def test_samples_are_one_processs(on_ranks, ranks, options, kv_heads, tied):
    """Greedy, sampled, and from a nucleus: the same tokens in fp32."""
    results = on_ranks(ranks, sampled, options, kv_heads, tied)
    for result in results:
        for found, expected in zip(result["found"], result["expected"], strict=True):
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
            for (_, logprobs), (_, theirs) in zip(found, expected, strict=True):
                np.testing.assert_allclose(logprobs, theirs, atol=1e-4)
        assert result["found"] == results[0]["found"]
        assert result["logit_error"] < 1e-5
        assert result["logits"].equal(results[0]["logits"])
        assert result["planned"] == pytest.approx(1.0, rel=0.02)
        # Norms are whole on each, and the last rank has the smaller part of the vocabulary.
        assert 0.98 / options.tensor < result["share"] < 1.02 / options.tensor
        assert (result["size"], result["pages"]) == (options.tensor, 1 / options.tensor)
        assert result["left"] == 0


def test_a_part_that_one_rank_cannot_hold_is_refused_by_all(on_ranks):
    first, second = on_ranks(2, refused, ParallelOptions(tensor=2))
    assert first == second
    assert first.startswith(
        "parallel: the part of the model that is one of 2, which sampling gathers"
    )
