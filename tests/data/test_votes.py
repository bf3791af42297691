"""Several raters on one pair: gathered, decided by majority, and laid out for AC1 and AC2."""

import numpy as np
import pytest
from foreign_rows import ROWS, SUMMARY
from turns import assistant, user

from llama2rt.data.check import check
from llama2rt.data.readers import Reader, read, write
from llama2rt.data.records import Comparison
from llama2rt.data.sources import Source
from llama2rt.data.votes import consensus, gather, vote_table
from llama2rt.errors import InputError
from llama2rt.evaluate.agreement import gwet

UNSAFE = "safety pairs that prefer an unsafe answer to a safe one"


def judged(rater, chosen, rating=None, safety=None, pair="ab", prompt="u"):
    rejected = pair.replace(chosen, "")
    said = {"rating": rating, "safety": safety, "rater": rater}
    return Comparison([user(prompt)], chosen, rejected, **said)


def voted(prefers, **more):
    votes = [{"prefers": {"c": "chosen", "r": "rejected", "n": "neither"}[p]} for p in prefers]
    return Comparison([user("u")], "a", "b", votes=votes, **more)


def test_two_of_three_decide():
    three = [judged("1", "b", "better"), judged("2", "a", "better"), judged("3", "a")]
    [decided], left_out = consensus(three)
    assert (decided.chosen, decided.rejected, decided.rating, decided.rater) == (
        *("a", "b", "better"),
        "",
    )
    assert decided.votes == [
        {"rater": "1", "prefers": "rejected", "rating": "better"},
        {"rater": "2", "prefers": "chosen", "rating": "better"},
        {"rater": "3", "prefers": "chosen"},
    ]
    assert not left_out


@pytest.mark.parametrize(
    ("prefers", "winner"),
    [
        ("ccr", "a"),
        ("crr", "b"),
        ("ccrr", None),
        ("crn", None),
        ("ccnn", None),  # half is not more than half
        ("nnc", None),
        ("ccn", "a"),
        ("r", "b"),
        ("cccrr", "a"),
    ],
)
def test_more_than_half_of_all_votes_win(prefers, winner):
    decided, left_out = consensus([voted(prefers)])
    assert [c.chosen for c in decided] == [winner] * (winner is not None)
    assert left_out == ({} if winner else {"pairs without a majority of votes": 1})


@pytest.mark.parametrize(
    ("ratings", "rating"),
    [
        (["significantly_better", "better", "negligibly_better"], "better"),
        (["significantly_better", "negligibly_better"], "negligibly_better"),  # the weaker
        (["slightly_better"], "slightly_better"),
        ([None, None], None),
    ],
)
def test_the_middle_rating_of_the_winners_votes_holds(ratings, rating):
    votes = [judged(str(i), "a", each) for i, each in enumerate(ratings)]
    [decided], _ = consensus(votes)
    assert decided.rating == rating
    [decided], _ = consensus([judged("x", "b", "significantly_better"), *votes, judged("y", "a")])
    assert decided.rating == rating  # the loser's says nothing


def test_pairs_are_told_apart_by_prompt_answers_kind_and_source():
    one = judged("1", "a")
    others = [
        judged("2", "a", prompt="v"),
        judged("2", "a", pair="ac"),
        Comparison([user("u")], "a", "b", kind="safety", rater="2"),
        Comparison([user("u")], "a", "b", source="s", rater="2"),
    ]
    assert len(gather([one, *others])) == 5
    unrated = [Comparison([user("u")], "a", "b"), Comparison([user("u")], "b", "a")]
    assert gather(unrated) == unrated  # who judged them is not known


def test_a_rater_has_one_vote_on_a_pair():
    [decided], _ = consensus([judged("1", "a"), judged("2", "b"), judged("2", "b"), voted("c")])
    assert [vote["prefers"] for vote in decided.votes] == ["chosen", "rejected", "chosen"]


def test_a_record_with_votes_is_decided_against_its_own_choice():
    record = voted("rrc", rating="better", safety="chosen_safe")
    [decided], _ = consensus([record])
    assert (decided.chosen, decided.rejected) == ("b", "a")
    assert (decided.rating, decided.safety) == (None, None)  # they were of the other order
    [kept], _ = consensus([voted("ccr", rating="better", safety="chosen_safe")])
    assert (kept.rating, kept.safety) == ("better", "chosen_safe")


@pytest.mark.parametrize(
    ("labels", "safety"),
    [
        # Who prefers what, and how it is labelled, from that rater's side.
        ([("a", "both_safe"), ("a", "both_safe"), ("a", "both_unsafe")], "both_safe"),
        ([("a", "chosen_safe"), ("a", "chosen_safe"), ("b", "both_safe")], "chosen_safe"),
        ([("a", "both_unsafe"), ("a", "both_unsafe"), ("b", "both_safe")], "both_unsafe"),
        ([("a", None), ("a", "both_unsafe")], "both_unsafe"),
        ([("a", "both_unsafe"), ("a", "both_safe")], "both_unsafe"),  # half is not a majority
    ],
)
def test_an_answer_is_safe_where_most_say_so(labels, safety):
    votes = [judged(str(i), chosen, None, label) for i, (chosen, label) in enumerate(labels)]
    [decided], left_out = consensus(votes)
    assert (decided.chosen, decided.safety) == ("a", safety)
    assert not left_out


def test_an_unsafe_winner_beside_a_safe_answer_is_left_out():
    """Section 3.2.1 excludes such pairs; here only the votes together make one."""
    labels = [("a", "both_unsafe"), ("a", "both_safe"), ("b", "chosen_safe"), ("a", "both_unsafe")]
    votes = [judged(str(i), chosen, None, label) for i, (chosen, label) in enumerate(labels)]
    votes.append(judged("5", "b", None, "chosen_safe"))
    decided, left_out = consensus(votes)
    assert (decided, left_out) == ([], {UNSAFE: 1})


def test_agreement_does_not_depend_on_who_won():
    """Coins agree by chance alone: with the winner as the first category they would not seem to."""
    rng = np.random.default_rng(0)
    coins = [voted("".join("cr"[i] for i in rng.integers(0, 2, 3))) for _ in range(400)]
    coins = [
        Comparison([user(str(i))], f"a{i}", f"b{i}", votes=coin.votes)
        for i, coin in enumerate(coins)
    ]
    found = gwet(vote_table(coins)[0], categories=2)
    assert found.items == 400
    assert abs(found.coefficient) < 3 * found.standard_error
    decided, left_out = consensus(coins)
    assert not left_out
    # Decided ones say the same: their order is drawn anew from their texts.
    np.testing.assert_allclose(
        gwet(vote_table(decided)[0], categories=2).coefficient, found.coefficient
    )


def test_the_table_of_votes():
    votes = [
        {"prefers": "chosen", "rating": "significantly_better"},
        {"prefers": "rejected", "rating": "negligibly_better"},
        {"prefers": "rejected"},
    ]
    pair = Comparison([user("u")], "a", "b", votes=votes)
    fewer = Comparison([user("v")], "b", "a", votes=votes[:1])
    # By SHA-256 "b" comes before "a".
    table, categories = vote_table([pair, Comparison([user("w")], "a", "b"), fewer])
    nan = np.nan
    np.testing.assert_array_equal(table, [[1, 0, 0], [0, nan, nan]])
    assert categories == 2
    table, categories = vote_table([pair, fewer], rated=True)
    np.testing.assert_array_equal(table, [[7, 3, nan], [0, nan, nan]])
    assert categories == 8
    tied = Comparison([user("x")], "a", "b", votes=[*votes[:2], {"prefers": "neither"}])
    table, categories = vote_table([pair, tied], rated=True)
    np.testing.assert_array_equal(table, [[8, 3, nan], [8, 3, 4]])
    assert categories == 9
    table, categories = vote_table([tied])
    np.testing.assert_array_equal(table, [[1, 0, 2]])
    assert categories == 3
    with pytest.raises(ValueError, match="no comparison has votes"):
        vote_table([Comparison([user("u")], "a", "b")])


def test_agreement_of_separate_files_of_raters_is_gwets():
    """AC1 of three raters on two pairs, by hand: observed (1 + 1/3) / 2, prevalence 5 of 6."""
    said = {"p": "aaa", "q": "aab"}
    rows = [
        judged(str(rater), chosen, prompt=prompt)
        for rater in range(3)
        for prompt, chosen in ((prompt, answers[rater]) for prompt, answers in said.items())
    ]
    table, categories = vote_table(rows)
    found = gwet(table, categories=categories)
    observed, share = (1 + 1 / 3) / 2, 5 / 6
    chance = 2 * share * (1 - share)
    np.testing.assert_allclose(found.coefficient, (observed - chance) / (1 - chance))


def test_a_source_with_consensus(rows_file):
    other = {**SUMMARY, "choice": 0, "worker": "w2"}
    third = {**SUMMARY, "worker": "w3"}
    split = ROWS["HelpSteer3", "comparison"]  # two of four
    path = rows_file(SUMMARY, other, split, third)
    assert len(read(path, "comparison")) == 4
    source = Source(path=path, consensus=True)
    reader = Reader(source, "comparison")
    [found] = reader
    assert (found.chosen, len(found.votes)) == ("c", 3)
    assert reader.left_out == {"pairs without a majority of votes": 1}
    assert "1 pairs without a majority of votes left out" in reader.files[0].warnings()[0]
    assert Source.parse(source.as_option()) == source
    with pytest.raises(InputError, match=r"no records: none of its rows gives one .*majority"):
        read(Source(path=rows_file(split), consensus=True), "comparison")
    with pytest.raises(InputError, match="x: consensus: means nothing to a file of prompts"):
        Reader(Source(path="x", consensus=True), "prompt")


def test_raters_and_votes_are_written_and_described(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [judged("1", "a"), judged("2", "b"), voted("ccr"), Comparison([user("u")], "a", "b")]
    write(path, records)
    assert read(path, "comparison") == records
    assert "votes" not in records[0].to_json()
    found = check(path, "comparison")
    assert found["raters"] == {"none": 2, "1": 1, "2": 1}
    assert found["votes"] == {"none": 3, "3": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"votes": {}}, "votes: expected a list of objects, got an object"),
        ({"votes": ["chosen"]}, "votes: item 1: expected an object, got text"),
        ({"votes": [{"prefers": "a"}]}, "votes: item 1 prefers: expected one of chosen, rejected,"),
        ({"votes": [{"rating": "better"}]}, "votes: item 1: missing key 'prefers'"),
        ({"votes": [{"prefers": "chosen", "by": "x"}]}, "votes: item 1: unknown keys by"),
        ({"votes": [{"prefers": "chosen", "rating": 3}]}, "votes: item 1 rating: expected one of"),
        ({"votes": [{"prefers": "chosen", "rater": 3}]}, "votes: item 1 rater: expected text"),
        ({"votes": [{"prefers": "neither", "rating": "better"}]}, "votes: item 1 rating: a vote"),
        (
            {"votes": [{"prefers": "neither", "safety": "chosen_safe"}]},
            "votes: item 1 safety: a vote for neither",
        ),
        ({"rater": 3}, "rater: expected text, got a number"),
        ({"rater": "x", "votes": [{"prefers": "chosen"}]}, "rater: a record with votes names"),
        ({"Votes": []}, "unknown key 'Votes': did you mean 'votes'"),
        ({"raters": "x"}, "unknown key 'raters': did you mean 'rater'"),
    ],
)
def test_bad_votes_are_named(rows_file, change, reason):
    row = {"prompt": [user("u")], "chosen": "c", "rejected": "r"}
    with pytest.raises(InputError) as error:
        read(rows_file(row, {**row, **change}), "comparison")
    assert str(error.value).split(":2: ", 1)[1].startswith(reason)


def test_a_rater_counts_in_every_format(rows_file):
    row = {"chosen": [user("u"), assistant("c")], "rejected": [user("u"), assistant("r")]}
    [found] = read(rows_file({**row, "rater": "7"}), "comparison")
    assert found.rater == "7"
