"""Which format a row is in: one, or an error that names both, or the one that `format` names."""

import json
from pathlib import Path

import pytest
from foreign_rows import ROWS
from turns import assistant, user

from llama2rt import cli
from llama2rt.data.check import check
from llama2rt.data.formats import FORMATS, OWN
from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError

PAIR = {"chosen": "c", "rejected": "r"}
TRANSCRIPTS = ROWS["Anthropic HH transcripts", "comparison"]

# (kind, row, what it could be by the keys that `format` takes)
AMBIGUOUS = [
    ("comparison", {"prompt": "u", **TRANSCRIPTS}, "anthropic-hh-transcripts trl-explicit-prompt"),
    ("comparison", {"prompt": [user("u")], **TRANSCRIPTS}, "llama2rt anthropic-hh-transcripts"),
    ("comparison", {"question": "u", **TRANSCRIPTS}, "anthropic-hh-transcripts orca-pairs"),
    ("comparison", {"question": "u", "input": "u", **PAIR}, "orca-pairs distilabel-orca"),
    (
        "comparison",
        {"trajectory": [user("u")], "prompt": "u", **PAIR},
        "trl-explicit-prompt ultrainteract",
    ),
    (
        "comparison",
        {"trajectory": [user("u")], "prompt": [user("u")], **PAIR},
        "llama2rt ultrainteract",
    ),
    (
        "dialogue",
        {"conversations": [user("u"), assistant("c")], "prompt": "u", "completion": "c"},
        "sharegpt-conversations trl-prompt-and-completion",
    ),
    (
        "dialogue",
        {"question": "u", "answer": "c", "prompt": "u", "completion": "c"},
        "gsm8k trl-prompt-and-completion",
    ),
    ("prompt", {"context_messages": [user("u")], "prompt": "u"}, "rlhflow-prompts trl-prompt-only"),
    (
        "prompt",
        {"id": "1", "messages": [user("u")], "question": "u", "answer": "c"},
        "llama2rt gsm8k-questions",
    ),
]


def conversation(record):
    return record.prompt if isinstance(record, Comparison) else record.messages


@pytest.mark.parametrize(("kind", "row", "keys"), AMBIGUOUS)
def test_a_row_that_two_formats_could_claim_names_both(rows_file, kind, row, keys):
    first, second = keys.split()
    names = {found.key: found.name for found in FORMATS} | {OWN: "our own form"}
    path = rows_file(row)
    with pytest.raises(InputError) as error:
        read(path, kind)
    assert str(error.value) == (
        f"{path}:1: the row could be in {names[first]} and {names[second]}: say which by "
        f'format = "{first}" or format = "{second}"'
    )


@pytest.mark.parametrize(
    ("kind", "row", "key"),
    [(kind, row, key) for kind, row, keys in AMBIGUOUS for key in keys.split()],
)
def test_a_named_format_settles_it(rows_file, kind, row, key):
    reader = Reader(rows_file(row), kind, format=key)
    [record] = reader
    assert conversation(record)[0] == user("u")
    assert reader.formats == {
        next((found.name for found in FORMATS if found.key == key), OWN): 1,
    }


def test_what_the_other_format_would_have_read_is_counted(rows_file):
    row = {"question": "u", "answer": "c", "prompt": "v", "completion": "d"}
    path = rows_file(row)
    assert read(path, "dialogue", format="gsm8k")[0].messages == [user("u"), assistant("c")]
    reader = Reader(path, "dialogue", format="trl-prompt-and-completion")
    assert list(reader) == [Dialogue([user("v"), assistant("d")])]
    assert reader.ignored_keys == {"question": 1, "answer": 1}


def test_a_named_format_reads_past_messages(rows_file):
    """Without it the row is in our own form, and its columns of text are not used."""
    row = {"messages": [user("x"), assistant("y")], "question": "u", "answer": "c"}
    assert read(rows_file(row), "dialogue")[0].messages == row["messages"]
    reader = Reader(rows_file(row), "dialogue", format="gsm8k")
    assert next(iter(reader)).messages == [user("u"), assistant("c")]
    assert reader.ignored_keys == {"messages": 1}


def test_one_transcript_beside_a_prompt_of_messages_is_an_answer(rows_file):
    """A policy may write one: what our own stages leave must read without a word."""
    row = {"prompt": [user("u")], **PAIR, "chosen": TRANSCRIPTS["chosen"]}
    reader = Reader(rows_file(row), "comparison")
    assert [c.chosen for c in reader] == [TRANSCRIPTS["chosen"]]
    assert reader.formats == {OWN: 1}


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_every_format_reads_its_own_row_by_name(rows_file, name, kind):
    path = rows_file(ROWS[name, kind])
    [key] = [found.key for found in FORMATS if (found.name, found.kind) == (name, kind)]
    assert read(path, kind, format=key) == read(path, kind)


def test_keys_of_formats_are_distinct():
    keys = [(found.key, found.kind) for found in FORMATS]
    assert len({*keys, (OWN, "comparison")}) == len(keys) + 1


def test_the_page_of_formats_names_them_all():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [found.key for found in FORMATS if f"`{found.key}`" not in page] == []


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"prompt": "u", **PAIR}, "shp", r"format 'shp': missing key 'history' \(keys found: cho"),
        ({"prompt": 3, **PAIR}, "trl-explicit-prompt", "the row's values are not those of TRL, ex"),
        (PAIR, "anthropic-hh-transcripts", "the row's values are not those of Anthropic HH"),
        ({"prompt": "u", **PAIR}, "llama2rt", "prompt: expected a list of messages, got text"),
    ],
)
def test_a_row_that_is_not_in_the_named_format(rows_file, row, format, reason):
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*{reason}"):
        read(rows_file(row), "comparison", format=format)


def test_an_unknown_format_is_said_before_anything_is_read(tmp_path):
    missing = tmp_path / "missing.jsonl"
    for kind, key in (("comparison", "gsm8k"), ("document", "shp"), ("prompt", "trl")):
        with pytest.raises(InputError) as error:
            Reader(missing, kind, format=key)
        expected = f"{missing}: format '{key}': not one of {kind}s; expected one of llama2rt"
        assert str(error.value).startswith(expected)
    Reader(missing, "document", format="llama2rt")


def test_a_source_names_its_format_and_the_argument_those_of_the_others(rows_file):
    row = {"question": "u", "answer": "c", "prompt": "v", "completion": "d"}
    one, two = rows_file(row, name="one.jsonl"), rows_file(row, name="two.jsonl")
    first = Source(path=one, format="gsm8k")
    found = read([first, two], "dialogue", format="trl-prompt-and-completion")
    assert [d.messages[0]["content"] for d in found] == ["u", "v"]
    assert Source.parse(first.as_option()) == first
    assert first.model_dump(mode="json") == {"path": str(one), "format": "gsm8k"}
    assert check(first, "dialogue")["formats"] == {"GSM8K": 1}


def test_check_takes_the_format_as_an_option(rows_file, capsys):
    path = rows_file({"context_messages": [user("u")], "prompt": "v"})
    with pytest.raises(SystemExit) as leaving:
        cli.main(["check", str(path), "--as", "prompt"])
    assert leaving.value.code == 2
    assert "the row could be in RLHFlow prompts and TRL prompt only" in capsys.readouterr().err
    arguments = ["--as", "prompt", "--format", "rlhflow-prompts", "--json"]
    cli.main(["check", str(path), *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["formats"] == {"RLHFlow prompts": 1}
    assert read(path, "prompt", format="trl-prompt-only") == [Prompt("rows.jsonl:1", [user("v")])]
