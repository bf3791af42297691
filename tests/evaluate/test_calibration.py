"""Calibration: a few pairs by hand, then models that are calibrated or too sure by construction."""

import numpy as np
import pytest

from llama2rt.evaluate.calibration import calibration
from llama2rt.evaluate.intervals import wilson

LOG3 = np.log(3.0)  # sigmoid: 3/4


def test_equal_pairs_by_hand():
    # Four pairs that the model calls 3 : 1 and gets right: put in random order, its predictions
    # are 3/4 where the chosen one stands first, and 1/4 where it stands second.
    found = calibration([LOG3] * 4, [0.0] * 4)
    assert found["pairs"] == 4 and sum(row["pairs"] for row in found["bins"]) == 4
    for row in found["bins"]:
        right = row["predicted"] > 0.5
        assert row["predicted"] == pytest.approx(0.75 if right else 0.25)
        assert row["mean"] == float(right)
        interval = wilson(row["pairs"] * right, row["pairs"])
        assert (row["low"], row["high"]) == (interval.low, interval.high)
    # In either order the prediction is a quarter away from what came.
    assert found["error"] == pytest.approx(0.25)


def test_error_weighs_bins_by_their_pairs():
    # One bin holds all: ten right and thirty wrong of a model that predicts sigmoid(+-log 3).
    difference = np.repeat([LOG3, -LOG3], [10, 30])
    found = calibration(difference, np.zeros(40), bins=1)
    (row,) = found["bins"]
    predicted, observed = row["predicted"], row["mean"]
    assert found["error"] == pytest.approx(abs(predicted - observed))
    # In bins by order, a claim of 3/4 (and of 1/4) comes true for the ten right pairs only.
    halves = calibration(difference, np.zeros(40), bins=2)["bins"]
    chosen_first = halves[1]["mean"] * halves[1]["pairs"] + halves[0]["mean"] * halves[0]["pairs"]
    assert chosen_first == pytest.approx(observed * 40)


def test_order_is_random_and_repeats():
    found = calibration(np.full(1000, LOG3), np.zeros(1000))
    low, high = found["bins"]
    assert low["predicted"] == pytest.approx(0.25) and high["predicted"] == pytest.approx(0.75)
    assert 400 < low["pairs"] < 600
    assert calibration(np.full(1000, LOG3), np.zeros(1000)) == found
    other = calibration(np.full(1000, LOG3), np.zeros(1000), seed=1)
    assert other["bins"][0]["pairs"] != low["pairs"]


def test_a_calibrated_model_is_found_so_and_one_too_sure_is_not():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20_000)
    chosen = np.where(rng.random(20_000) < 1 / (1 + np.exp(-margin)), margin, -margin)
    assert calibration(chosen, np.zeros(20_000))["error"] < 0.02
    sure = calibration(3 * chosen, np.zeros(20_000))
    assert sure["error"] > 0.1
    assert sure["bins"][0]["mean"] > sure["bins"][0]["predicted"] + 0.05
    assert sure["bins"][-1]["mean"] < sure["bins"][-1]["predicted"] - 0.05


def test_extreme_and_equal_scores():
    far = calibration([1e6, 1e6], [-1e6, -1e6])
    assert {row["predicted"] for row in far["bins"]} <= {0.0, 1.0} and far["error"] == 0.0
    (tied,) = calibration([1.0, 1.0], [1.0, 1.0])["bins"]
    assert (tied["predicted"], tied["pairs"]) == (0.5, 2)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration([1.0], [0.0], bins=0)
    with pytest.raises(ValueError, match="equally long"):
        calibration([1.0, 2.0], [0.0])
    with pytest.raises(ValueError, match="finite"):
        calibration([np.nan], [0.0])
