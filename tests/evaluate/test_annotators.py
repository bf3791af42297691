"""Agreement of annotators on pairs that were judged more than once, by hand."""

import pytest

from llama2rt.data.records import Comparison
from llama2rt.evaluate.agreement import gwet
from llama2rt.evaluate.annotators import agreement


def vote(name, chosen, rejected, rating="better"):
    return Comparison([{"role": "user", "content": name}], chosen, rejected, rating)


def test_pairs_judged_more_than_once_by_rating():
    votes = [
        vote("three", "a", "b", "significantly_better"),
        vote("three", "a ", "b", "significantly_better"),
        vote("three", "b", "a", "negligibly_better"),
        vote("two", "c", "d"),
        vote("two", "c", "d"),
        vote("once", "a", "b"),
    ]
    found = agreement(votes)
    assert found["pairs"] == 2
    rows = {row["rating"]: row for row in found["by_rating"]}
    assert {name: row["mean"] for name, row in rows.items()} == {
        "significantly_better": 0.5,
        "better": 1.0,
        "negligibly_better": 0.0,
        "average": pytest.approx((1 / 3 + 1) / 2),
    }
    assert [row["rating"] for row in found["by_rating"]][-1] == "average"
    assert (rows["average"]["pairs"], rows["average"]["votes"]) == (2, 5)
    # a and c come first; ranks 0..3 for the first answer, 7..4 for the second.
    nominal = gwet([[0, 0, 1], [0, 0, -1]], categories=2)
    ordinal = gwet([[0, 0, 4], [1, 1, -1]], categories=8, weights="ordinal")
    assert found["ac1"]["coefficient"] == pytest.approx(nominal.coefficient)
    assert found["ac2"]["coefficient"] == pytest.approx(ordinal.coefficient)


def test_votes_without_a_rating_have_no_scale():
    found = agreement([vote("q", "a", "b", None), vote("q", "b", "a")])
    assert "ac2" not in found and found["ac1"]["coefficient"] < 0
    assert [row["rating"] for row in found["by_rating"]] == ["better", "unrated", "average"]


def test_pairs_judged_once_say_nothing():
    assert agreement([vote("q", "a", "b"), vote("q", "a", "c"), vote("r", "a", "b")]) is None
