"""Does a reward model know how sure it may be?

A Bradley-Terry reward model claims a probability with every pair: sigmoid of the score difference.
Accuracy reads its sign alone; calibration asks whether, of the pairs it calls 70 : 30, annotators
decide 70 % that way. The ranking loss rewards this where no margin is subtracted; a margin (Llama
2, Table 27) pushes scores further apart, and such a model is expected to claim too much.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.preference import paired_scores

BINS = 10


class Bin(TypedDict):
    """Pairs with a similar prediction: its mean, and the share observed with its interval."""

    predicted: float
    mean: float
    low: float
    high: float
    pairs: int


class Calibration(TypedDict):
    """`bins` that hold a pair, by rising prediction; the expected calibration `error` in [0, 1]."""

    bins: list[Bin]
    error: float
    pairs: int


def calibration(
    chosen: ArrayLike, rejected: ArrayLike, *, bins: int = BINS, seed: int = 0
) -> Calibration:
    """Predicted against observed preference, from raw scores [n] of both sides of n pairs.

    Records name the chosen response first, so each pair is first put in random order (drawn from
    `seed`); the prediction is P(first wins) = sigmoid(score of the first - score of the second),
    the observation whether the first is the chosen one. Predictions fall into `bins` of equal
    width on [0, 1]; shares carry 95 % Wilson intervals. The expected calibration error is
    sum_b (n_b / n) |share_b - mean prediction_b| (Naeini et al., 2015; Guo et al., 2017, eq. 3).
    It is never negative, so noise alone keeps it above 0: compare models on the same pairs.
    ValueError as in `preference.accuracy_table`, and for fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    first, second = paired_scores(chosen, rejected)
    kept = np.random.default_rng(seed).random(len(first)) < 0.5
    difference = np.where(kept, first - second, second - first)
    predicted = (1 + np.tanh(difference / 2)) / 2  # the sigmoid, without overflow
    rows: list[Bin] = []
    error = 0.0
    for inside in _members(predicted, bins):
        share = wilson(float(kept[inside].sum()), int(inside.sum()))
        claim = float(predicted[inside].mean())
        rows.append(
            {
                "predicted": claim,
                "mean": share.mean,
                "low": share.low,
                "high": share.high,
                "pairs": int(inside.sum()),
            }
        )
        error += float(inside.mean()) * abs(share.mean - claim)
    return {"bins": rows, "error": error, "pairs": len(first)}


def expected_error(predicted: ArrayLike, right: ArrayLike, *, bins: int = BINS) -> float:
    """Expected calibration error, as `calibration` has it, of n claims `predicted` in [0, 1] [n]
    (what a model gives the answer it chooses) against whether each was `right` [n]."""
    claims, truth = np.asarray(predicted, np.float64), np.asarray(right, np.float64)
    return sum(
        float(inside.mean()) * abs(float(truth[inside].mean()) - float(claims[inside].mean()))
        for inside in _members(claims, bins)
    )


def _members(predicted: np.ndarray, bins: int) -> list[np.ndarray]:
    """bool [n] of each bin of equal width that holds one of the predictions, by rising ones."""
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    return [index == number for number in np.unique(index)]
