"""Agreement of annotators on pairs that several of them judged, by hand."""

import pytest

from llama2rt.data.records import Comparison
from llama2rt.evaluate.agreement import gwet
from llama2rt.evaluate.annotators import agreement


def vote(name, chosen, rejected, rating="better", *, rater):
    asked = [{"role": "user", "content": name}]
    return Comparison(asked, chosen, rejected, rating, rater=rater)


def test_pairs_with_several_votes_by_rating():
    votes = [
        vote("three", "a", "b", "significantly_better", rater="x"),
        vote("three", "a", "b", "significantly_better", rater="y"),
        vote("three", "b", "a", "negligibly_better", rater="z"),
        vote("two", "c", "d", rater="x"),
        vote("two", "c", "d", rater="y"),
        vote("once", "a", "b", rater="x"),
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
    # Whichever answer of a pair comes first: one of these is the table of its two choices.
    tables = [([0, 0, 1], [0, 0, -1]), ([0, 0, 1], [1, 1, -1])]
    nominal = [gwet(table, categories=2).coefficient for table in tables]
    assert min(abs(found["ac1"]["coefficient"] - value) for value in nominal) < 1e-12
    # Steps 0 to 3 for the first answer, 7 to 4 for the other.
    tables = [([0, 0, 4], [1, 1, -1]), ([0, 0, 4], [6, 6, -1])]
    ordinal = [gwet(table, categories=8, weights="ordinal").coefficient for table in tables]
    assert min(abs(found["ac2"]["coefficient"] - value) for value in ordinal) < 1e-12


def test_votes_of_one_record_and_votes_without_a_rating():
    votes = [{"prefers": "chosen", "rating": "better"}, {"prefers": "rejected"}]
    votes.append({"prefers": "neither"})
    asked = [{"role": "user", "content": "q"}]
    found = agreement([Comparison(asked, "a", "b", votes=votes)])
    assert [row["rating"] for row in found["by_rating"]] == ["better", "unrated", "average"]
    assert all(row["mean"] == 0 for row in found["by_rating"])
    assert found["ac1"]["coefficient"] < 0 and "ac2" in found  # "neither" has a place of its own
    found = agreement([Comparison(asked, "a", "b", votes=votes[:2])])
    assert "ac2" not in found


def test_rows_that_name_no_rater_are_no_votes():
    """A row that stands twice in a file is a duplicate, not an agreement."""
    asked = [{"role": "user", "content": "q"}]
    assert agreement([Comparison(asked, "a", "b")] * 2) is None
    assert agreement([vote("q", "a", "b", rater="x"), vote("r", "a", "b", rater="x")]) is None
