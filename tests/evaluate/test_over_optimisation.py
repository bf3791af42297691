"""Reward against a judge: SciPy's rank correlation, bins by hand, an over-optimised policy."""

import numpy as np
import pytest
from scipy import stats

from llama2rt.evaluate.over_optimisation import reward_against_judge


def test_rank_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 6, (40, 5)).astype(float)  # with ties
    worth = rewards + rng.integers(0, 8, (40, 5))
    found = reward_against_judge(rewards, worth)
    pooled = stats.spearmanr(rewards.ravel(), worth.ravel()).statistic
    assert found["pooled"]["mean"] == pytest.approx(pooled, rel=1e-12)
    assert found["pooled"]["low"] < pooled < found["pooled"]["high"]
    each = [
        stats.spearmanr(x, y).statistic
        for x, y in zip(rewards, worth, strict=True)
        if np.ptp(x) and np.ptp(y)
    ]
    assert found["per_prompt"]["mean"] == pytest.approx(np.mean(each), rel=1e-12)
    assert found["per_prompt"]["undefined"] == 40 - len(each)


def test_pooled_interval_draws_prompts_and_not_responses():
    # Copies of a response tell nothing new: the interval stays that of the single ones.
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(60, 1))
    worth = rewards + rng.normal(size=(60, 1))
    single = reward_against_judge(rewards, worth)["pooled"]
    copied = reward_against_judge(np.repeat(rewards, 8, 1), np.repeat(worth, 8, 1))["pooled"]
    assert copied["mean"] == pytest.approx(single["mean"])
    assert copied["low"] == pytest.approx(single["low"])
    assert copied["high"] == pytest.approx(single["high"])
    # Fisher's interval of as many independent pairs, as a check of its width.
    half = 1.96 / np.sqrt(57)
    fisher = np.tanh(np.arctanh(single["mean"]) + half) - np.tanh(np.arctanh(single["mean"]) - half)
    assert single["high"] - single["low"] == pytest.approx(fisher, rel=0.35)


def test_bins_by_hand():
    # Twenty responses make two bins: the rewards below the median and those from it on.
    rewards = np.arange(20.0).reshape(2, 10)
    worth = np.array([[1.0] * 10, [0.25] * 5 + [0.75] * 5])
    low, high = reward_against_judge(rewards, worth)["bins"]
    assert low == {"reward": 4.5, "mean": 1.0, "low": 1.0, "high": 1.0, "responses": 10}
    assert high == {"reward": 14.5, "mean": 0.5, "low": 0.5, "high": 0.5, "responses": 10}
    # The median itself, of an odd number, belongs to the upper one.
    rewards = np.arange(21.0).reshape(3, 7)
    bins = reward_against_judge(rewards, rewards)["bins"]
    assert [row["responses"] for row in bins] == [10, 11]


def test_a_bin_averages_a_prompts_responses_first():
    # All in one bin: prompt 0 has worth 1 three times, prompt 1 has 0 three times.
    (found,) = reward_against_judge([[1.0] * 3, [1.0] * 3], [[1.0] * 3, [0.0] * 3])["bins"]
    assert (found["mean"], found["low"], found["high"], found["responses"]) == (0.5, 0, 1, 6)


def test_equal_rewards_share_a_bin_and_have_no_correlation():
    found = reward_against_judge(np.ones((30, 4)), np.random.default_rng(0).normal(size=(30, 4)))
    assert [row["responses"] for row in found["bins"]] == [120]
    for key in ("pooled", "per_prompt"):
        assert found[key] == {"mean": None, "low": None, "high": None, "undefined": 30}
    two = np.repeat([0.0, 1.0], 60).reshape(30, 4)
    assert [row["responses"] for row in reward_against_judge(two, two)["bins"]] == [60, 60]


def test_over_optimisation_shows_at_the_right_end():
    rng = np.random.default_rng(2)
    rewards = rng.normal(0, 1, (300, 4))
    worth = rewards - 1.5 * np.clip(rewards - 0.5, 0, None) ** 2 + 0.1 * rng.normal(size=(300, 4))
    bins = reward_against_judge(rewards, worth)["bins"]
    assert len(bins) == 10 and bins[6]["mean"] > bins[0]["mean"] + 1
    assert bins[-1]["high"] < bins[6]["low"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="share a shape"):
        reward_against_judge([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="share a shape"):
        reward_against_judge([1.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        reward_against_judge([[1.0]], [[np.nan]])
