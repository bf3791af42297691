"""Models side by side: against the table of one model, and against counts by hand."""

import numpy as np
import pytest

from llama2rt.data.records import Comparison
from llama2rt.evaluate import preference
from llama2rt.evaluate.reward_models import compare


def pair(rating=None, safety=None, source=""):
    asked = [{"role": "user", "content": "which?"}]
    return Comparison(asked, "this", "that", rating, safety, source=source)


RATED = [pair("better"), pair("better"), pair("slightly_better"), pair()]


def test_one_seed_is_the_table_of_that_model():
    chosen, rejected = [1.0, 2.0, 0.5, 3.0], [0.0, 2.5, 0.5, 1.0]
    found = compare({"one": [(chosen, rejected)]}, RATED)
    table = preference.accuracy_table(chosen, rejected, [p.rating for p in RATED])
    rows = found["models"]["one"]["intervals"]
    assert [{k: v for k, v in row.items() if k != "by_seed"} for row in rows] == table
    assert [row["by_seed"] for row in rows] == [[0.5], [0.5], [1.0], [0.625]]
    assert found["differences"] == {} and found["unread"] == {} and found["pairs"] == 4
    assert found["models"]["one"]["scores"]["gap"] == pytest.approx(0.625)


def test_seeds_are_averaged_pair_by_pair_and_models_compared_on_them():
    low = [0.0, 0.0, 0.0, 0.0]
    right, half = [1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]
    found = compare({"a": [(half, low), (right, low)], "b": [(right, low)] * 2}, RATED)
    a, b = (found["models"][name]["intervals"][-1] for name in "ab")
    assert (a["mean"], a["by_seed"], b["mean"]) == (0.75, [0.5, 1.0], 1.0)
    assert found["differences"]["b"]["mean"] == 0.25
    assert found["differences"]["b"]["low"] < 0.25 < found["differences"]["b"]["high"]
    assert len(found["models"]["a"]["errors"]) == 2


def test_all_models_are_measured_on_the_pairs_that_all_can_read():
    nan = np.nan
    found = compare(
        {
            "a": [([1.0, 1.0, -1.0, -1.0], [0.0] * 4)],
            "b": [([1.0, 1.0, 1.0, nan], [0.0] * 3 + [nan])],
        },
        RATED,
    )
    assert (found["pairs"], found["unread"]) == (3, {"b": 1})
    assert found["models"]["a"]["intervals"][-1]["mean"] == pytest.approx(2 / 3)
    assert [row["rating"] for row in found["models"]["a"]["intervals"]] == [
        "better",
        "slightly_better",
        "average",
    ]


def test_unsafe_responses_found_and_safe_ones_called_unsafe():
    pairs = [pair(safety=label) for label in ("chosen_safe", "both_safe", "both_unsafe", None)]
    # Unsafe: rejected of the first, both of the third; safe: chosen of the first, both of the
    # second.
    chosen, rejected = [1.0, 2.0, -1.0, -5.0], [-1.0, -2.0, 3.0, -5.5]
    model = compare({"one": [(chosen, rejected)]}, pairs)["models"]["one"]
    recall, alarms = model["unsafe"]["recall"], model["unsafe"]["false_alarms"]
    assert (recall["mean"], recall["responses"]) == (pytest.approx(2 / 3), 3)
    assert (alarms["mean"], alarms["responses"]) == (pytest.approx(1 / 3), 3)
    by_label = {row["rating"]: row["mean"] for row in model["labels"]}
    assert by_label == {"chosen_safe": 1.0, "both_safe": 1.0, "both_unsafe": 0.0}
    assert "unsafe" not in compare({"one": [(chosen, rejected)]}, RATED)["models"]["one"]


def test_sources_apart_where_there_are_several():
    pairs = [pair(source="first"), pair(source="second"), pair(source="second")]
    model = compare({"one": [([1.0, 1.0, 0.0], [0.0, 0.0, 1.0])]}, pairs)["models"]["one"]
    assert {name: row["mean"] for name, row in model["sources"].items()} == {
        "first": 1.0,
        "second": 0.5,
    }


@pytest.mark.parametrize(
    "scores, message",
    [
        ({}, "no model"),
        ({"a": []}, "a: expected scores of both sides of 4 pairs"),
        ({"a": [([1.0], [0.0])]}, "a: expected scores of both sides of 4 pairs"),
        ({"a": [([np.nan] * 4, [0.0] * 4)]}, "no pair that all of a can read"),
    ],
)
def test_scores_that_do_not_fit(scores, message):
    with pytest.raises(ValueError, match=message):
        compare(scores, RATED)
