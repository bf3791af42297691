"""Ranks share a rollout: everything is done once, and all have one process's results."""

import numpy as np
import pocket as problem
import pytest
from parallel_rollouts import rolled_out, spread_failing, spread_items

from llama2rt.parallel import ParallelOptions


def test_items_are_done_once_and_everyone_has_them_in_order(on_ranks):
    results = on_ranks(4, spread_items, [1.0] * 7)
    assert sorted(index for result in results for index in result["mine"]) == list(range(7))
    assert max(len(result["mine"]) for result in results) == 2
    by = {index: rank for rank, result in enumerate(results) for index in result["mine"]}
    assert all(
        result["found"] == [f"{index} by {by[index]}" for index in range(7)] for result in results
    )


def test_fewer_items_than_ranks_and_neighbours_that_stay_together(on_ranks):
    results = on_ranks(4, spread_items, [2.0, 1.0])
    assert [result["mine"] for result in results] == [[0], [1], [], []]
    assert on_ranks(4, spread_items, [])[3]["found"] == []
    results = on_ranks(4, spread_items, [1.0] * 6, [0, 0, 0, 1, 2, 2])
    assert [result["mine"] for result in results] == [[0, 1, 2], [4, 5], [3], []]
    assert spread_items([1.0] * 3)["found"] == ["0 by 0", "1 by 0", "2 by 0"]


def test_what_one_rank_raises_all_raise(on_ranks):
    assert on_ranks(4, spread_failing, [1.0] * 5) == [("rank 1's prompt", True)] * 4


@pytest.mark.parametrize(
    ("count", "n", "ranks", "options"),
    [
        (7, 2, 4, None),
        (3, 1, 4, None),
        (7, 2, 2, ParallelOptions()),
        (7, 2, 4, ParallelOptions(tensor=2)),
        (1, 1, 4, ParallelOptions(data=2, tensor=2)),
    ],
    ids=["whole", "few", "sharded", "cut", "cut-one"],
)
def test_rollouts_are_one_processs(on_ranks, pocket, count, n, ranks, options):
    """By models that are whole on every rank, and by those that ranks share."""
    prompts = problem.prompts(problem.HELD_OUT)[:count]
    expected = rolled_out(pocket, prompts, n)
    assert expected["prompts"] == [prompt.id for prompt in prompts for _ in range(n)]
    results = on_ranks(ranks, rolled_out, pocket, prompts, n, options)
    assert all(result == results[0] for result in results)
    for name, value in results[0].items():
        if name in ("tokens", "prompts"):
            assert value == expected[name]
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
