"""What looks like messages, a transcript, a template or a lost column, and is ordinary text."""

import json
import logging

import pytest
from turns import assistant, user

from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError

PAIR = {"chosen": "c", "rejected": "d"}


def ultrafeedback(*answers):
    scored = [{"response": a, "fine-grained_score": i} for i, a in enumerate(answers)]
    return {"instruction": "q", "completions": scored}


def rows_with_answer(value):
    """Rows with that answer: the kind of record, the row, and what names the answer."""
    pair = {"chosen": value, "rejected": "d"}
    lists = {"chosen": [assistant(value)], "rejected": [assistant("d")]}
    return [
        ("dialogue", {"prompt": "q", "completion": value}, "completion"),
        ("dialogue", {"question": "q", "answer": value}, "answer"),
        ("dialogue", {"messages": [user("q"), assistant(value)]}, "messages: the last message"),
        ("comparison", {"prompt": "q", **pair}, "chosen"),
        ("comparison", {"prompt": [user("q")], **pair}, "chosen"),  # our own form
        ("comparison", {"prompt": [user("q")], **lists}, "chosen"),
        ("comparison", ultrafeedback("d", value), "chosen"),
    ]


@pytest.mark.parametrize(
    "value",
    [
        json.dumps([{"from": "London", "to": "Paris"}]),
        json.dumps([{"role": "admin", "n": 3}]),
        json.dumps([{"role": "admin", "content": 3}]),
        json.dumps([{"value": 1}]),
        json.dumps([{**user("q"), "weight": 1}]),
        json.dumps([user("q"), {"value": "x"}]),
        json.dumps([user("q")]) + ' is the list, and the other [{"value": 1}]',
        str([{"value": "it's"}]),
        "[{'role': " + "[" * 50_000 + "]",
        "[{'role': " + "-" * 50_000 + "1}]",
        r"[{'role': '\d'}]",  # Python warns of the escape
    ],
)
def test_an_answer_in_json_is_ordinary_text(rows_file, value):
    for kind, row, _ in rows_with_answer(value):
        [record] = read(rows_file(row), kind)
        answer = record.chosen if kind == "comparison" else record.messages[-1]["content"]
        assert answer == value


@pytest.mark.parametrize(
    "value",
    [
        json.dumps([user("q"), assistant("a")]),
        json.dumps([{"from": "gpt", "value": "a"}], indent=1),
        str([user("it's"), assistant("a")]),
        "[{'role': 'user', 'content': 'q'} {'role': 'assistant', 'content': 'a'}]",  # NumPy's
        "[{'content': 'q', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]",
    ],
)
def test_a_message_list_as_an_answer_is_refused_in_every_form(rows_file, value):
    for kind, row, key in rows_with_answer(value):
        with pytest.raises(InputError, match=rf"\.jsonl:1: {key}: holds a list written as text"):
            read(rows_file(row), kind)


def test_a_message_list_costs_its_own_pairs_only(rows_file):
    value = json.dumps([assistant("a")])
    solutions = {
        name: {"is_correct": name == "right", "solution": solution}
        for name, solution in {"right": "c", "wrong": "d", "list": value}.items()
    }
    rows = (ultrafeedback("d", "c", value), {"question": "q", "ground_truth": "g", **solutions})
    for row in rows:
        reader = Reader(rows_file(row), "comparison", skip_invalid=1)
        assert [(c.chosen, c.rejected) for c in reader] == [("c", "d")]
        assert len(reader.skipped) == 1


LOST = ":1: {}: the conversation is read without it"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        (ultrafeedback("c", "d"), "context"),  # its completions are a list, its prompt is not
        ({"prompt": "q", "chosen": [assistant("c")], "rejected": [assistant("d")]}, "input"),
        ({side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in PAIR.items()}, "context"),
    ],
)
def test_lists_of_answers_do_not_make_a_plain_prompt_whole(rows_file, row, key):
    assert read(rows_file(row), "comparison")
    with pytest.raises(InputError, match=LOST.format(key)):
        read(rows_file({**row, key: "a passage"}), "comparison")


def test_columns_of_text_beside_a_prompt_of_messages_are_counted(rows_file):
    for row in (
        {"prompt": [user("q")], **PAIR},
        {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("d")]},
    ):
        reader = Reader(rows_file({**row, "context": "a passage"}), "comparison")
        assert len(list(reader)) == 1
        assert reader.ignored_keys == {"context": 1}


ALPACA = "Below is an instruction.\n\n### Instruction:\nsum up\n\n### Input:\na passage\n"


@pytest.mark.parametrize(
    ("kind", "row", "keys"),
    [
        ("comparison", {"prompt": "q", "instruction": "q\n", **PAIR}, ["instruction"]),
        (
            "comparison",
            {"prompt": ALPACA, "instruction": "sum up", "input": " a passage", **PAIR},
            ["instruction", "input"],
        ),
        (
            "dialogue",
            {"question": "a passage\nwho?", "context": "a passage", "answer": "x"},
            ["context"],
        ),
        (
            "dialogue",
            {
                "messages": [{"role": "system", "content": "be brief"}, user("q"), assistant("a")],
                "system_prompt": "be brief",
            },
            ["system_prompt"],
        ),
        # The first row of a HelpSteer prompt gives no pair.
        (
            "comparison",
            {"prompt": "q", "response": "a", "helpfulness": 1, "correctness": 1, "input": "q"},
            ["input"],
        ),
    ],
)
def test_what_stands_in_the_prompt_is_not_lost(rows_file, kind, row, keys):
    second = {**row, "response": "b", "helpfulness": 4} if "response" in row else row
    reader = Reader(rows_file(row, second), kind)
    assert list(reader)
    assert reader.ignored_keys == dict.fromkeys(keys, 2)
    with pytest.raises(InputError, match=LOST.format(keys[0])):
        read(rows_file({**row, keys[0]: "another"}), kind)


def test_an_answer_or_a_pictures_name_asks_nothing(rows_file):
    row = {"question": "q in a.jpg", "answer": "a long answer"}
    for key, value in (("context", "a long answer"), ("image", "a.jpg")):
        with pytest.raises(InputError, match=LOST.format(key)):
            read(rows_file({**row, key: value}), "dialogue")


@pytest.mark.parametrize(
    "value", ["null", "None", "N/A", " nan ", "NaN", [None], ["", "n/a"], [[]], {"A": None}]
)
def test_values_that_say_nothing(rows_file, value):
    reader = Reader(rows_file({"prompt": "q", "input": value, **PAIR}), "comparison")
    assert len(list(reader)) == 1
    assert reader.ignored_keys == {"input": 1}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Human: q\n\nAssistant: a", "ends with an answer; expected the user's turn or an empty"),
        ("\n\nHuman: q\n\nAssistant: a", "ends with an answer"),
        ("Human: q\n\nHuman: r\n\nAssistant:", "turn 2 is the user's; expected the assistant's"),
        ("\n\nAssistant: a\n\nHuman: q", "turn 1 is the assistant's; expected the user's"),
    ],
)
def test_a_transcript_that_is_no_prompt_is_named_as_one(rows_file, prompt, reason):
    for kind, row in (
        ("prompt", {"prompt": prompt}),
        ("comparison", {"prompt": prompt, **PAIR}),
        ("dialogue", {"prompt": prompt, "completion": "c"}),
    ):
        said = rf":1: prompt: read as a transcript \(Human:/Assistant:\), (which|whose) {reason}"
        with pytest.raises(InputError, match=said):
            read(rows_file(row), kind)


@pytest.mark.parametrize("value", ["Human: q\n\nAssistant: a", "q\n<extra_id_1>Assistant\na"])
def test_a_finished_conversation_ends_with_its_answer(rows_file, value):
    [found] = read(rows_file({"conversations": value}), "dialogue")
    assert found.messages == [user("q"), assistant("a")]


@pytest.mark.parametrize(
    "prompt",
    [
        "Human: noun or adjective?",
        "q\n<extra_id_1>User\nr",
        "<extra_id_1>Assistant\na\n<extra_id_1>User\nr",
        "What do <extra_id_0> and <extra_id_1>User\nmean in T5?",
        "q\n<extra_id_1>Assistant\nand <extra_id_1>, what are they?",
        "<|im_start|> is a token in which models?",
        "<|im_start|>user is how a turn begins in which models?",
        "<|user|> and <|assistant|> tags: which library writes them?",
        "<start_of_turn> or <end_of_turn>?",
        "<|start_header_id|> and <|end_header_id|>",
        "### Human: and ### Assistant: are whose tags?",
    ],
)
def test_text_that_speaks_of_markers_is_ordinary(rows_file, prompt):
    assert read(rows_file({"prompt": prompt}), "prompt") == [Prompt("rows.jsonl:1", [user(prompt)])]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|user|>q<|end|><|assistant|>",
        "<|prompter|>q<|endoftext|><|assistant|>",
        "<|im_start|>user<|im_sep|>q<|im_end|>",
        "<|system|>\r\ns",
    ],
)
def test_templates_without_line_ends_are_known_too(rows_file, prompt):
    with pytest.raises(InputError, match=":1: prompt: laid out by a chat template"):
        read(rows_file({"prompt": prompt}), "prompt")


@pytest.mark.parametrize("row", [{"prompt": "q", **PAIR}, {"prompt": [user("q")], **PAIR}])
def test_a_system_in_another_case_that_is_no_text_is_counted(rows_file, row):
    for value in (7, True, {"os": "linux"}):
        reader = Reader(rows_file({**row, "System": value}), "comparison")
        assert len(list(reader)) == 1
        assert reader.ignored_keys == {"System": 1}


@pytest.mark.parametrize(
    ("kind", "row", "key", "value"),
    [
        ("prompt", {"prompt": "q"}, "ID", 7),
        ("prompt", {"id": "a", "messages": [user("q")]}, "Kind", 1),
        ("comparison", {"prompt": "q", **PAIR}, "Rating", 5),
        ("comparison", {"prompt": "q", **PAIR}, "Safety", True),
        ("comparison", {"prompt": [user("q")], **PAIR}, "Rating", 0.5),
    ],
)
def test_numbers_under_our_keys_in_another_case_are_refused(rows_file, kind, row, key, value):
    hint = rf":1: unknown key '{key}': did you mean '{key.lower()}'\?"
    with pytest.raises(InputError, match=hint):
        read(rows_file({**row, key: value}), kind)


def test_scores_written_as_text_contradict_too(rows_file, caplog):
    row = {"prompt": "q", **PAIR}
    scores = [("1", "2"), ("2", "1"), ("n/a", "2"), ([], 2), (2, "2.0")]
    rows = [{**row, "score_chosen": chosen, "score_rejected": other} for chosen, other in scores]
    with caplog.at_level(logging.WARNING):
        assert len(read(rows_file(*rows), "comparison")) == 5
    assert "2 pairs whose chosen answer has no higher score than the other kept" in caplog.text
