"""Best-of-N curves against the mean over every subset, one by one."""

from itertools import combinations

import numpy as np
import pytest

from llama2rt.evaluate.best_of import curves


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
