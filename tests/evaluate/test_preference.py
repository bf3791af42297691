"""Accuracy by rating: counted as a person would count it, ties half."""

import numpy as np
import pytest

from llama2rt.data.records import RATINGS
from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.preference import accuracy, accuracy_table


def test_counts_by_rating_with_ties_half():
    ratings = ["better", "better", "significantly_better", "better", None]
    chosen, rejected = [2.0, 1.0, 3.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 5.0]
    rows = {row["rating"]: row for row in accuracy_table(chosen, rejected, ratings)}
    assert list(rows) == ["significantly_better", "better", "unrated", "average"]
    assert (rows["better"]["mean"], rows["better"]["pairs"], rows["better"]["ties"]) == (0.5, 3, 1)
    assert rows["significantly_better"]["mean"] == 1.0
    assert rows["unrated"]["mean"] == 0.0
    assert rows["average"]["mean"] == pytest.approx(2.5 / 5)
    low_high = (rows["average"]["low"], rows["average"]["high"])
    assert low_high == pytest.approx(wilson(2.5, 5)[1:])
    assert accuracy(chosen, rejected, ratings) == {name: row["mean"] for name, row in rows.items()}


def test_average_is_over_pairs_not_over_ratings():
    ratings = ["better"] * 9 + ["negligibly_better"]
    got = accuracy([1.0] * 9 + [0.0], [0.0] * 9 + [1.0], ratings)
    assert got["average"] == pytest.approx(0.9)


def test_equals_brute_force():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(0, 4, (2, 500)).astype(float)
    ratings = [RATINGS[i] for i in rng.integers(0, 4, 500)]
    for name, share in accuracy(chosen, rejected, ratings).items():
        picked = [i for i in range(500) if name in ("average", ratings[i])]
        won = sum(
            1.0 * (chosen[i] > rejected[i]) + 0.5 * (chosen[i] == rejected[i]) for i in picked
        )
        assert share == pytest.approx(won / len(picked))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], []), "equally long"),
        (([1.0], [1.0, 2.0]), "equally long"),
        (([1.0], [0.0], ["great"]), "unknown rating 'great'"),
        (([1.0], [0.0], ["better", "better"]), "1 entries, got 2"),
        (([np.nan], [0.0]), "finite"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        accuracy(*arguments)
