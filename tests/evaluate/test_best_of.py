"""Best-of-N curves against the mean over every subset, one by one."""

from itertools import combinations

import numpy as np
import pytest

from llama2rt.evaluate.best_of import chosen, curves, judged


def test_equals_the_mean_over_all_subsets():
    rewards = np.random.default_rng(0).normal(size=(3, 7))
    rewards[1, :3] = rewards[1, 3]  # ties
    got = curves(rewards)
    assert got["n"] == [1, 2, 3, 4, 5, 6, 7]
    for i, size in enumerate(got["n"]):
        subsets = [list(chosen) for chosen in combinations(range(7), size)]
        best = np.mean([[row[s].max() for s in subsets] for row in rewards])
        middle = np.mean([[np.median(row[s]) for s in subsets] for row in rewards])
        assert got["max"][i] == pytest.approx(best, rel=1e-12)
        assert got["median"][i] == pytest.approx(middle, rel=1e-12)


def test_hundred_samples_stay_exact_and_monotone():
    rewards = np.random.default_rng(1).normal(size=(50, 100))
    got = curves(rewards)
    assert got["max"][0] == pytest.approx(rewards.mean())
    assert got["max"][-1] == pytest.approx(rewards.max(axis=1).mean())
    assert got["median"][-1] == pytest.approx(np.median(rewards, axis=1).mean())
    assert (np.diff(got["max"]) > 0).all()
    # Expected maximum of n standard normals (Harter, 1961): 1.5388 at 10, 2.2491 at 50; the
    # sample of 5000 normals has a standard error of about 0.015.
    assert got["max"][9] == pytest.approx(1.5388, abs=0.08)
    assert got["max"][49] == pytest.approx(2.2491, abs=0.12)


@pytest.mark.parametrize("bad", [[], [1.0, 2.0], [[]], [[np.nan]]])
def test_bad_rewards_are_refused(bad):
    with pytest.raises(ValueError, match="rewards must be"):
        curves(bad)


def test_what_is_chosen_of_n_equals_the_mean_over_all_subsets():
    """Of equals each is as likely to be taken."""
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(4, 6))
    rewards[1, :3] = rewards[1].max() + 1  # three best ones
    worth = rng.integers(2, size=(4, 6)).astype(float)
    got = chosen(rewards, worth)
    for size in range(1, 7):
        subsets = [list(some) for some in combinations(range(6), size)]
        for row, said, found in zip(rewards, worth, got[:, size - 1], strict=True):
            means = [said[s][row[s] == row[s].max()].mean() for s in subsets]
            assert found == pytest.approx(np.mean(means), rel=1e-12)
    with pytest.raises(ValueError, match="worth: expected finite"):
        chosen(rewards, worth[:, :5])


def test_a_judges_table_of_best_of_n():
    worth = np.array([[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    rows = judged([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1]], worth)
    assert [row["n"] for row in rows] == [1, 2, 4, 5]
    assert [row["best"]["mean"] for row in rows] == pytest.approx([0.2, 0.4, 0.8, 1.0])
    # One prompt's right answer is the best by reward, the other's the last.
    assert [row["chosen"]["mean"] for row in rows] == pytest.approx([0.2, 0.2, 0.4, 0.5])
    assert rows[-1]["chosen"]["low"] == 0.0 and rows[-1]["chosen"]["high"] == 1.0
