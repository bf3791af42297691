"""Intervals against SciPy, and where a formula is easily got wrong: at 0, at 1, at ties."""

import numpy as np
import pytest
from scipy import stats

from llama2rt.evaluate.intervals import (
    bootstrap,
    bootstrap_columns,
    bootstrap_grouped,
    paired,
    wilson,
)


@pytest.mark.parametrize("successes, trials", [(0, 10), (10, 10), (1, 1), (7, 20), (912, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_equals_scipy(successes, trials, confidence):
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    got = wilson(successes, trials, confidence=confidence)
    assert got == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-12)
    assert got.low <= got.mean <= got.high


def test_wilson_takes_half_successes_and_refuses_nonsense():
    assert wilson(5.5, 11).mean == 0.5
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r"trials|successes"):
            wilson(successes, trials)


def test_bootstrap_agrees_with_scipy_and_repeats():
    values = np.random.default_rng(1).gamma(2.0, 1.0, 300)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=5
    ).confidence_interval
    got = bootstrap(values, seed=2)
    width = expected.high - expected.low
    assert got.mean == pytest.approx(values.mean())
    # Monte-Carlo error of a 2.5 % quantile from 10 000 draws is about 1 % of the width.
    assert got.low == pytest.approx(expected.low, abs=0.04 * width)
    assert got.high == pytest.approx(expected.high, abs=0.04 * width)
    assert got == bootstrap(values, seed=2)
    assert got != bootstrap(values, seed=3)


def test_bootstrap_does_not_depend_on_how_draws_are_chunked(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap(values, resamples=500)
    monkeypatch.setattr("llama2rt.evaluate.intervals._DRAWS_AT_ONCE", 40 * 7)
    assert bootstrap(values, resamples=500) == whole


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(7)
    inside = 0
    for seed in range(300):
        interval = bootstrap(rng.normal(0.3, 1, 60), resamples=600, seed=seed)
        inside += interval.low <= 0.3 <= interval.high
    assert 0.90 <= inside / 300 <= 0.985


def test_bootstrap_of_equal_or_single_values_has_no_width():
    assert bootstrap([2.0]) == (2.0, 2.0, 2.0)
    assert bootstrap([0.25] * 9) == (0.25, 0.25, 0.25)
    for bad in ([], [[1.0]], [np.nan], [np.inf]):
        with pytest.raises(ValueError, match="values"):
            bootstrap(bad)


def test_pairing_removes_the_difficulty_prompts_share():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 5, 200)
    a, b = difficulty + rng.normal(0.5, 0.1, 200), difficulty + rng.normal(0, 0.1, 200)
    difference = paired(a, b)
    assert difference.low > 0.4 and difference.high < 0.6
    assert bootstrap(a).high - bootstrap(a).low > 1
    with pytest.raises(ValueError, match="pair up"):
        paired([1.0, 2.0], [1.0])


def test_columns_are_bootstraps_of_their_own():
    values = np.random.default_rng(0).normal(size=(700, 3)) * [1.0, 10.0, 0.0]
    for column, got in zip(values.T, bootstrap_columns(values, seed=3), strict=True):
        assert got == pytest.approx(bootstrap(column, seed=3), rel=1e-9, abs=1e-12)
    with pytest.raises(ValueError, match=r"values must be \[n, columns\]"):
        bootstrap_columns([1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_columns([[1.0, np.nan]])


def test_units_of_unequal_size_weigh_as_much_as_they_hold():
    sums, counts = [2.0] * 40 + [0.0] * 40, [2] * 40 + [1] * 40
    got = bootstrap_grouped([[1.0, 1.0]] * 40 + [[0.0]] * 40)
    assert got.mean == pytest.approx(2 / 3)
    ratios = np.random.default_rng(5).integers(0, 80, (20_000, 80))
    ratios = np.array(sums)[ratios].sum(axis=1) / np.array(counts)[ratios].sum(axis=1)
    assert got[1:] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)
    values = np.random.default_rng(0).normal(size=40)
    twice = [[value, value] for value in values]
    assert bootstrap_grouped(twice) == pytest.approx(bootstrap(values), abs=1e-12)
    for bad in ([], [[1.0], []], [[np.nan]], [[1.0, np.inf]]):
        with pytest.raises(ValueError, match="values"):
            bootstrap_grouped(bad)
