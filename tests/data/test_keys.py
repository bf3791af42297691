"""No key of a row is lost: ours count in every format, others are named, null is absent.

Planted in a row of every format: our own keys, a misspelt one, an unknown one, null ones at every
depth, a key of another format, and an id that is there already.
"""

import io
import json
import logging

import pytest
from foreign_rows import CHOSEN, HELPSTEER, PKU, ROWS, USER
from good_records import GOOD
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llama2rt.data.check import check, print_check
from llama2rt.data.formats import FORMATS
from llama2rt.data.json_values import without_nulls
from llama2rt.data.readers import Reader, read, write
from llama2rt.data.records import Comparison, Dialogue, Prompt, Sample
from llama2rt.errors import InputError

OURS = {
    "comparison": {
        "rating": "better",
        "safety": "chosen_safe",
        "kind": "safety",
        "source": "mine",
    },
    "dialogue": {"source": "mine"},
    "prompt": {"id": "p-7", "kind": "safety"},
}
MISSPELT = {
    "comparison": ("ratings", "rating"),
    "dialogue": ("sources", "source"),
    "prompt": ("kinds", "kind"),
}
FOREIGN = [pytest.param(kind, row, id=name) for (name, kind), row in ROWS.items()]
OWN = [pytest.param(kind, GOOD[kind], id=f"our {kind}") for kind in GOOD]


def test_every_format_has_a_row_here():
    known = {(found.name, found.kind) for found in FORMATS}
    others = ("PKU-SafeRLHF", "HelpSteer", "Summarize from feedback")
    assert known == {*ROWS, *((name, "comparison") for name in others)}


def test_each_row_is_read_in_its_format(rows_file):
    for (name, kind), row in ROWS.items():
        reader = Reader(rows_file(row), kind)
        [record] = reader
        assert reader.formats == {name: 1}
        assert reader.ignored_keys == {}
        said = record.prompt if kind == "comparison" else record.messages
        assert next(m for m in said if m["role"] == "user") == USER
        if kind == "comparison":
            assert (record.chosen, record.rejected) == ("c", "r")


@pytest.mark.parametrize(("kind", "row"), FOREIGN)
def test_our_own_keys_count_in_every_format(rows_file, kind, row):
    [record] = read(rows_file({**row, **OURS[kind]}), kind)
    assert {key: getattr(record, key) for key in OURS[kind]} == OURS[kind]
    for key in OURS[kind].keys() - {"source"}:
        value = 7 if key == "id" else "best ever"
        with pytest.raises(InputError, match=rf"rows\.jsonl:2: {key}: expected"):
            read(rows_file(row, {**row, **OURS[kind], key: value}), kind)


@pytest.mark.parametrize(("kind", "row"), FOREIGN)
def test_a_misspelt_key_is_refused_and_beside_the_right_one_counted(rows_file, kind, row):
    wrong, right = MISSPELT[kind]
    row = {key: value for key, value in row.items() if key != right}  # Orca's list of ratings
    with pytest.raises(InputError, match=rf":2: unknown key '{wrong}': did you mean '{right}'"):
        read(rows_file(row, {**row, wrong: OURS[kind][right]}), kind)
    reader = Reader(rows_file({**row, right: OURS[kind][right], wrong: "typo"}), kind)
    assert len(list(reader)) == 1
    assert reader.ignored_keys == {wrong: 1}


@pytest.mark.parametrize(("kind", "row"), [*FOREIGN, *OWN])
def test_an_unknown_key_is_counted_and_named_with_its_line(rows_file, caplog, kind, row):
    new = {"id": "another"} if kind == "prompt" else {}
    path = rows_file(row, {**row, "weight_of_it": 0.5, **new})
    with caplog.at_level(logging.WARNING):
        assert read(path, kind)
    expected = f"{path}: keys not used: weight_of_it (1 row, first in line 2)"
    assert expected in [record.message for record in caplog.records]
    found = check(path, kind)
    assert found["ignored_keys"] == {"weight_of_it": 1}
    printed = io.StringIO()
    print_check(found, Console(file=printed, width=400))
    assert expected in printed.getvalue()
    assert "50.0%" in printed.getvalue()  # of the rows, not of the keys


def with_nulls(value):
    """`value` as Arrow gives it back: every struct with a field that others have."""
    if isinstance(value, dict):
        return {"elsewhere": None, **{key: with_nulls(inner) for key, inner in value.items()}}
    return [with_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("kind", "row"), [*FOREIGN, *OWN])
def test_a_null_key_is_an_absent_key_at_every_depth(rows_file, kind, row):
    ours = {key: None for key in OURS.get(kind, {}) if key not in row}
    others = {"conversations": None, "completions": None, "system": None, "trajectory": None}
    padded = {**ours, **{key: None for key in others if key not in row}, **with_nulls(row)}
    reader = Reader(rows_file(padded), kind)
    assert list(reader) == read(rows_file(row), kind)
    assert reader.ignored_keys == {}


json_trees = st.recursive(
    st.none() | st.integers(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


@given(json_trees)
def test_nulls_go_and_nothing_else(value):
    def nulls(value):
        inner = value.values() if isinstance(value, dict) else value
        inside = sum(map(nulls, inner)) if isinstance(value, dict | list) else 0
        return inside + (list(value.values()).count(None) if isinstance(value, dict) else 0)

    cleaned = without_nulls(value)
    assert nulls(cleaned) == 0
    assert without_nulls(cleaned) == cleaned
    if not nulls(value):
        assert cleaned == value


def test_scores_that_arrow_made_null_are_absent(rows_file):
    row = {**GOOD["sample"], "scores": {"helpfulness": 0.5, "safety": None}}
    [sample] = read(rows_file(row), "sample")
    assert sample.scores == {"helpfulness": 0.5}


def test_a_required_null_key_is_missing(rows_file):
    with pytest.raises(InputError, match=r":1: missing key 'rejected' \(keys found: chosen, kind"):
        read(rows_file({**GOOD["comparison"], "rejected": None}), "comparison")


@pytest.mark.parametrize("row", [GOOD["prompt"], {"prompt": "u", "id": "p"}])
def test_duplicate_ids_name_the_first_line_in_every_format(rows_file, row):
    one = rows_file({"prompt": "v"}, {"prompt": "w", "id": "p"}, name="one.jsonl")
    two = rows_file(row, name="two.jsonl")
    with pytest.raises(InputError) as error:
        read([one, two], "prompt")
    assert str(error.value) == f"{two}:1: duplicate id 'p', first used at {one}:2"


def test_keys_that_a_format_carries_are_named_in_one_line(rows_file, caplog):
    path = rows_file(*HELPSTEER)
    with caplog.at_level(logging.INFO):
        read(path, "comparison")
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", f"{path}: known keys not used: coherence")
    ]
    assert check(path, "comparison")["known_keys_not_used"] == {"coherence": 2}


def test_samples_that_stages_leave_read_without_a_word(rows_file, caplog):
    extra = {"kind": "safety", "prompt_tokens": [1], "tokens": [2], "finished": True}
    [sample] = read(rows_file({**GOOD["sample"], **extra}), "sample")
    assert isinstance(sample, Sample)
    assert not caplog.records


def test_a_key_that_only_the_format_can_give_is_refused(rows_file):
    with pytest.raises(InputError, match=r":1: kind: a row of PKU-SafeRLHF decides it itself"):
        read(rows_file({**PKU, "kind": "safety"}), "comparison")
    found = read(rows_file({**PKU, "rating": "better", "source": "mine"}), "comparison")
    assert [(c.kind, c.rating, c.source) for c in found] == [
        ("helpfulness", "better", "mine"),
        ("safety", "better", "mine"),
    ]


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("kind", "row"),
    [p for p in [*FOREIGN, *OWN] if p.values[0] != "document" and "system" not in p.values[1]],
)
def test_a_sibling_system_is_the_system_message(rows_file, kind, row):
    reader = Reader(rows_file({**row, "system": "be brief"}), kind)
    [record] = reader
    messages = record.prompt if kind == "comparison" else record.messages
    assert messages[0] == SYSTEM
    assert messages[1:] == (lambda r: r.prompt if kind == "comparison" else r.messages)(
        read(rows_file(row), kind)[0]
    )
    assert reader.ignored_keys == {}
    assert read(rows_file({**row, "system": " "}), kind) == read(rows_file(row), kind)
    with pytest.raises(InputError, match=":1: system: expected text, got an object"):
        read(rows_file({**row, "system": {"os": "linux"}}), kind)


def test_a_second_system_message_must_be_the_same(rows_file):
    row = {"messages": [SYSTEM, USER, CHOSEN]}
    assert read(rows_file({**row, "system": "be brief"}), "dialogue") == [Dialogue(row["messages"])]
    with pytest.raises(InputError, match=":1: system: differs from the conversation's"):
        read(rows_file({**row, "system": "be long"}), "dialogue")


def test_further_keys_of_a_sharegpt_turn_are_named(rows_file):
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "c", "train": False}]
    with pytest.raises(InputError, match=r":1: messages: message 2: expected the keys .* train"):
        read(rows_file({"conversations": turns}), "dialogue")


def test_prompts_take_the_whole_context(rows_file):
    context = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]
    answers = {"chosen": [*context, CHOSEN], "rejected": [*context, {**CHOSEN, "content": "r"}]}
    for row in (
        {"prompt": "v", **answers},
        {"prompt": "v", "messages": answers["chosen"], "prompt_id": "x"},
        {"context_messages": context},
        {"prompt": "\n\nHuman: u\n\nAssistant: a\n\nHuman: v\n\nAssistant:"},
    ):
        assert read(rows_file(row), "prompt") == [Prompt("rows.jsonl:1", context)]


def test_a_transcript_as_prompt_is_a_conversation(rows_file):
    row = {"prompt": "\n\nHuman: u\n\nAssistant:", "chosen": " c", "rejected": " r"}
    assert read(rows_file(row), "comparison") == [Comparison([USER], " c", " r")]


def test_one_blank_answer_leaves_a_rows_good_pairs(rows_file, caplog):
    ultra = ROWS["UltraFeedback", "comparison"]
    blank = {"response": " \n", "fine-grained_score": 1.0}
    twice = {"response": " c ", "fine-grained_score": 1.0}
    row = {**ultra, "completions": [blank, *ultra["completions"], twice]}
    found = read(rows_file(row), "comparison")
    assert [(c.chosen, c.rejected) for c in found] == [("c", "r"), ("r", " c ")]
    assert "1 blank answers left out" in caplog.text

    solutions = ROWS["GSM8K model solutions", "comparison"]
    wrong = {"is_correct": False, "solution": ""}
    [pair] = read(rows_file({**solutions, "30B": wrong}), "comparison")
    assert (pair.chosen, pair.rejected) == ("c", "r")

    steer = [HELPSTEER[0], {**HELPSTEER[1], "response": ""}, HELPSTEER[1]]
    [pair] = read(rows_file(*steer), "comparison")
    assert (pair.chosen, pair.rejected) == ("c", "r")


def test_one_bad_answer_costs_its_own_pairs_only(rows_file):
    ultra = ROWS["UltraFeedback", "comparison"]
    bad = {"response": "a\0b", "fine-grained_score": 1.0}
    path = rows_file({**ultra, "completions": [*ultra["completions"], bad]})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: rejected: holds a null character"):
        read(path, "comparison")
    reader = Reader(path, "comparison", skip_invalid=1)
    assert [(c.chosen, c.rejected) for c in reader] == [("c", "r")]
    assert len(reader.skipped) == 1


def test_written_records_carry_nothing_unknown(tmp_path):
    for kind, row in GOOD.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text(json.dumps(row))
        write(path, read(path, kind))
        reader = Reader(path, kind)
        list(reader)
        assert not reader.ignored_keys
