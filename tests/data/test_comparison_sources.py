"""Rows of summaries, web answers, Stack Exchange, Nectar, HelpSteer3 and Alpaca, each in its
published schema with its odd cases. The rows are our own."""

import copy
import time

import pytest
from foreign_rows import ROWS, SUMMARY
from turns import assistant, user

from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError

WEBGPT = ROWS["WebGPT comparisons", "comparison"]
EXCHANGE = ROWS["Stack Exchange preferences", "comparison"]
NECTAR = ROWS["Nectar", "comparison"]
STEER3 = ROWS["HelpSteer3", "comparison"]
ARTICLE = {"id": "1", "article": "\n\na\nb\n", "site": "cnn", "title": "t"}
POST = "SUBREDDIT: r/AskReddit\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
STANDARD = {"chosen": [user("u"), assistant("c")], "rejected": [user("u"), assistant("r")]}


def changed(row, *path_and_value):
    """A copy of `row` with the value at a path replaced; ... removes it."""
    *path, last, value = path_and_value
    row = holder = copy.deepcopy(row)
    for key in path:
        holder = holder[key]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return row


def test_summaries_have_the_post_before_them_and_a_rater(rows_file):
    other = changed(changed(SUMMARY, "choice", 0), "worker", "w2")
    reader = Reader(rows_file(SUMMARY, other), "comparison")
    ours = {"source": "summarize-from-feedback"}
    assert list(reader) == [
        Comparison([user(POST)], "c", "r", rater="w1", **ours),
        Comparison([user(POST)], "r", "c", rater="w2", **ours),
    ]
    assert reader.ignored_keys == {}
    assert reader.carried_keys == {"batch": 2, "split": 2, "extra": 2}


@pytest.mark.parametrize(
    ("info", "asked"),
    [
        (ARTICLE, "Article:\na\nb\n\nTL;DR:"),
        # The Hugging Face copy has every field in every row.
        (
            {**ARTICLE, "post": None, "subreddit": None},
            "Article:\na\nb\n\nTL;DR:",
        ),
        ({"id": "1", "post": "p"}, "POST: p\n\nTL;DR:"),
    ],
)
def test_summaries_of_articles_and_bare_posts(rows_file, info, asked):
    [found] = read(rows_file({**SUMMARY, "info": info}), "comparison")
    assert found.prompt == [user(asked)]


def test_summaries_of_one_text_are_left_out(rows_file):
    same = changed(SUMMARY, "summaries", 0, "text", "c ")
    reader = Reader(rows_file(SUMMARY, same), "comparison")
    assert len(list(reader)) == 1
    assert reader.left_out == {"pairs of one text": 1}


def test_a_tie_of_web_answers_and_a_blank_one_are_left_out(rows_file):
    tie = {**WEBGPT, "score_0": 0.0, "score_1": 0}
    second = {**WEBGPT, "score_0": "-1", "score_1": 1.0}
    reader = Reader(rows_file(WEBGPT, tie, {**WEBGPT, "answer_1": "\n"}, second), "comparison")
    assert [(c.chosen, c.rejected) for c in reader] == [("c", "r"), ("r", "c")]
    assert reader.left_out == {"pairs of equal score": 1, "blank answers": 1}
    source = Source(path=rows_file(WEBGPT, second), minimum_score_difference=1.5)
    assert [c.chosen for c in read(source, "comparison")] == ["r"]


def exchange(*scores):
    answers = [{"text": f"a{i}", "pm_score": score} for i, score in enumerate(scores)]
    return {**EXCHANGE, "answers": answers}


def test_stack_exchange_pairs_by_score_and_ten_a_question(rows_file):
    def pairs(row):
        reader = Reader(rows_file(row), "comparison")
        return [(c.chosen, c.rejected) for c in reader], dict(reader.left_out)

    assert pairs(exchange(1, 3, 3)) == ([("a1", "a0"), ("a2", "a0")], {"pairs of equal score": 1})
    found, left_out = pairs(exchange(*range(30)))
    assert found == [(f"a{i}", "a0") for i in range(1, 11)]
    assert left_out == {"further pairs of questions with ten already, from each": 1}
    five = exchange(*range(5))
    five["answers"][0]["text"] = " "
    found, left_out = pairs(five)
    assert (len(found), left_out) == (6, {"blank answers": 1})


def test_nectar_makes_all_pairs_of_seven(rows_file):
    answers = [{"answer": f"a{i}", "model": "m", "rank": float(7 - i)} for i in range(7)]
    context = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "
    reader = Reader(rows_file({**NECTAR, "prompt": context, "answers": answers}), "comparison")
    found = list(reader)
    assert len(found) == 21
    assert all(c.prompt == [user("q"), assistant("a"), user("r")] for c in found)
    assert all(int(c.chosen[1]) > int(c.rejected[1]) for c in found)
    assert {c.source for c in found} == {"nectar"}  # not the row's list of names
    answers[0]["rank"] = answers[1]["rank"]
    reader = Reader(rows_file({**NECTAR, "answers": answers}), "comparison")
    assert len(list(reader)) == 20
    far = Source(path=rows_file({**NECTAR, "answers": answers}), minimum_score_difference=5)
    # Ranks 6, 6, 5, 4, 3, 2, 1: the two last against the first.
    assert {(c.chosen, c.rejected) for c in read(far, "comparison")} == {("a6", "a0"), ("a6", "a1")}


def test_helpsteer3_keeps_what_each_person_said(rows_file):
    [found] = read(rows_file(STEER3), "comparison")
    assert (found.chosen, found.rejected, found.rating) == ("c", "r", "better")
    assert found.votes == [
        {"prefers": "chosen", "rating": "significantly_better"},
        {"prefers": "chosen", "rating": "slightly_better"},
        {"prefers": "rejected", "rating": "slightly_better"},
        {"prefers": "neither"},
    ]
    second = {**STEER3, "overall_preference": 1}
    tie = {**STEER3, "overall_preference": 0}
    reader = Reader(rows_file(second, tie), "comparison")
    [found] = reader
    assert (found.chosen, found.rating) == ("r", "slightly_better")
    assert [vote["prefers"] for vote in found.votes] == [
        *("rejected", "rejected", "chosen", "neither")
    ]
    assert reader.left_out == {"pairs called a tie": 1}
    [found] = read(rows_file(changed(STEER3, "individual_preference", ...)), "comparison")
    assert found.votes == []


def test_the_standard_form_of_rlhflow(rows_file):
    """Of HH its sets have scores of null; a conversation may be longer than one turn."""
    longer = [user("u"), assistant("a"), user("v")]
    rows = [
        {**STANDARD, "chosen_score": None, "rejected_score": None},
        {**STANDARD, "chosen_score": 4.5, "rejected_score": 2.0},
        {"chosen": [*longer, assistant("c")], "rejected": [*longer, assistant("r")]},
    ]
    reader = Reader(rows_file(*rows), "comparison")
    assert [(c.prompt, c.chosen, c.rejected) for c in reader] == [
        ([user("u")], "c", "r"),
        ([user("u")], "c", "r"),
        (longer, "c", "r"),
    ]
    assert reader.ignored_keys == {}
    close = Source(path=rows_file(rows[1], rows[0]), minimum_score_difference=3)
    with pytest.raises(InputError, match=":2: minimum_score_difference: the row has no score_cho"):
        read(close, "comparison")


def test_context_messages_with_what_their_collection_carries(rows_file):
    row = {"dataset": "d", "context": "laid out", "context_messages": [user("u")], "id": "7"}
    reader = Reader(rows_file(row), "prompt")
    assert list(reader) == [Prompt("7", [user("u")])]
    assert (reader.ignored_keys, reader.carried_keys) == ({}, {"context": 1, "dataset": 1})


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "u", "output": "c"}, ["u", "c"]),
        ({"instruction": "u", "input": " ", "output": "c"}, ["u", "c"]),
        ({"instruction": "u", "input": "<noinput>", "output": "c"}, ["u", "c"]),
        ({"instruction": "u", "input": "No input", "output": "c"}, ["u", "c"]),
        ({"instruction": "u\n", "input": "x", "output": "c"}, ["u\n\nx", "c"]),
        ({"instruction": "", "input": "x", "output": "c"}, ["x", "c"]),
        ({"instruction": "u", "output": "c", "history": [["p", "o"]]}, ["p", "o", "u", "c"]),
    ],
)
def test_alpaca(rows_file, row, turns):
    [found] = read(rows_file(row), "dialogue")
    assert found == Dialogue([user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(turns)])
    [asked] = read(rows_file(row), "prompt")
    assert asked.messages == found.messages[:-1]


def test_alpacas_system_and_what_it_does_not_read(rows_file):
    row = {"instruction": "u", "input": "", "output": "c", "system": "s", "text": "all of it"}
    reader = Reader(rows_file(row), "dialogue")
    assert next(iter(reader)).messages[0] == {"role": "system", "content": "s"}
    assert (reader.ignored_keys, reader.carried_keys) == ({}, {"text": 1})
    with pytest.raises(InputError, match=":1: context: the conversation is read without it"):
        read(rows_file({**row, "context": "a passage"}), "dialogue")


FAULTS = [
    (changed(SUMMARY, "choice", 2), "choice: expected 0 or 1, got 2"),
    (changed(SUMMARY, "choice", True), "choice: expected 0 or 1, got true"),
    (changed(SUMMARY, "info", "p"), "info: expected an object, got text"),
    (changed(SUMMARY, "info", "post", ...), "info: expected a post or an article"),
    (changed(SUMMARY, "info", "article", "a"), "info: expected a post or an article"),
    (changed(SUMMARY, "info", "title", 3), "title: expected text, got a number"),
    (changed(SUMMARY, "summaries", 1, ...), "summaries: expected a list of two"),
    (changed(SUMMARY, "summaries", 0, "text", ...), "summaries: item 1 has no text"),
    (changed(SUMMARY, "summaries", 0, "x"), "summaries: item 1: expected an object, got text"),
    (changed(SUMMARY, "summaries", 0, "text", ""), "rejected is blank"),
    (changed(SUMMARY, "worker", 7), "worker: expected text, got a number"),
    (changed(WEBGPT, "question", "u"), "question: expected an object, got text"),
    (changed(WEBGPT, "question", "full_text", ...), "question has no full_text"),
    (changed(WEBGPT, "score_0", 1), "score_0 and score_1: expected a sum of 0, got 0.5"),
    (changed(WEBGPT, "score_0", "nan"), "score_0: expected a finite number"),
    (changed(WEBGPT, "answer_0", ["c"]), "answer_0: expected text, got a list"),
    (changed(EXCHANGE, "answers", 0, "pm_score", ...), "answers: item 1 has no pm_score"),
    (changed(EXCHANGE, "answers", 0, "pm_score", "many"), "answers: item 1 pm_score: expected a"),
    (changed(EXCHANGE, "answers", 0, "text", 3), "answers: item 1 text: expected text, got a nu"),
    (changed(EXCHANGE, "answers", 0, 3), "answers: item 1: expected an object, got a number"),
    (exchange(*range(1001)), "answers: 1001 answers; at most 1000 to a prompt are paired"),
    (changed(NECTAR, "answers", 0, "rank", 0), "answers: a rank below 1"),
    (changed(NECTAR, "answers", 0, "answer", ...), "answers: item 1 has no answer"),
    (changed(NECTAR, "answers", NECTAR["answers"] * 40), "answers: 80 answers; at most 64"),
    (changed(NECTAR, "prompt", "\n\nHuman: u\n\nAssistant: a"), "prompt: read as a transcript"),
    (changed(STEER3, "overall_preference", 4), "overall_preference: expected a whole number from"),
    (changed(STEER3, "overall_preference", 0.5), "overall_preference: expected a whole number"),
    (
        changed(STEER3, "individual_preference", 1, "score", None),
        "individual_preference: item 2 has no score",
    ),
    (changed(STEER3, "context", [assistant("a")]), "prompt: message 1: expected role user"),
    ({**STANDARD, "rejected": [user("v"), assistant("r")]}, "rejected: its context differs"),
]


@pytest.mark.parametrize(("row", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_odd_rows_are_named(rows_file, row, reason):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: ") as error:
        read(rows_file(row), "comparison")
    assert str(error.value).split(":1: ", 1)[1].startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "messages: message 2: assistant content is blank"),
        ({"instruction": "", "input": "none"}, "messages: message 1: user content is blank"),
        ({"history": "p"}, "history: expected a list of pairs"),
        ({"history": [["p", "o"], ["p"]]}, "history: item 2: expected an instruction and its"),
        ({"input": ["x"]}, "input: expected text, got a list"),
        ({"instruction": "[INST] u"}, "messages: message 1: "),
    ],
)
def test_odd_rows_of_alpaca_are_named(rows_file, change, reason):
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: {reason}"):
        read(rows_file({"instruction": "u", "output": "c", **change}), "dialogue")


def test_many_answers_are_refused_at_once(rows_file):
    """All pairs of ten thousand answers are fifty million."""
    many = [{"response": f"a{i}", "fine-grained_score": i} for i in range(10_000)]
    models = {f"m{i}": {"is_correct": i % 2 == 0, "solution": f"s{i}"} for i in range(10_000)}
    equal = [{"text": f"a{i}", "pm_score": 1} for i in range(1000)]
    begin = time.process_time()
    for row, reason in (
        ({"instruction": "u", "completions": many}, ":1: completions: 10000 answers; at most 64"),
        ({"question": "u", "ground_truth": "g", **models}, ":1: solutions: 10000 answers; at mo"),
        ({**EXCHANGE, "answers": equal}, "no records: none of its rows gives one"),
    ):
        with pytest.raises(InputError, match=reason):
            read(rows_file(row), "comparison")
    steer = {"prompt": "u", "correctness": 2}
    rows = [{**steer, "response": f"a{i}", "helpfulness": i % 5} for i in range(70)]
    with pytest.raises(InputError, match=":65: response: 65 answers; at most 64 to a prompt"):
        read(rows_file(*rows), "comparison")
    assert time.process_time() - begin < 10
