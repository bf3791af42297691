"""Two thousand malformed and hostile records: every one is read right or refused with FILE:LINE.

benchmarks/data/fuzz_readers.py reads a hundred thousand.
"""

import random

import hostile_rows
import pytest
from good_records import GOOD

from llama2rt import cli
from llama2rt.data import readers, records
from llama2rt.data.file_reader import FileReader
from llama2rt.data.readers import Reader, read
from llama2rt.errors import InputError


def deep(levels):
    """What the column says, in as many lists."""
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


def test_hostile_records_are_read_or_refused_by_line(tmp_path):
    draw = random.Random(20)
    total = hostile_rows.Found()
    for kind in (*hostile_rows.BEGIN, "comparison", "comparison", "dialogue"):
        found = hostile_rows.check(tmp_path, kind, 250, draw)
        total.records += found.records
        total.good += found.good
        total.faults += found.faults
        total.reasons += found.reasons
        (tmp_path / f"{kind}.jsonl").unlink()
    assert total.records == 2000
    # Neither nearly all refused nor nearly all read, and for many reasons.
    assert total.good > 200
    assert total.faults > 500
    assert len(total.reasons) > 100


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("sample", {"scores": {"\ud800": 1}}, "scores: a name: lone surrogate at character 0"),
        ("dialogue", {"tools": deep(400)}, "nested too deeply"),
        ("comparison", {"safety": "\x1b[2J"}, "safety: expected one of"),
        ("prompt", {"Kind": 1, "\ud800" + "k" * 5000: 1}, "unknown key 'Kind'"),
        (
            "dialogue",
            {"messages": [{"role": "x" * 5000, "content": "u"}]},
            "messages: message 1: r",
        ),
    ],
)
def test_what_the_hundred_thousand_found(rows_file, kind, change, reason):
    with pytest.raises(InputError) as error:
        read(rows_file({**GOOD[kind], **change}), kind)
    said = str(error.value).split(":1: ", 1)[1]
    assert said.startswith(reason)
    assert said.isprintable()
    assert len(said) <= readers.LONGEST_REASON


def test_unknown_keys_are_said_as_any_terminal_shows_them(rows_file, capsys):
    path = rows_file({**GOOD["prompt"], "\ud800\x1b[2J": 1, "k" * 5000: 2})
    cli.main(["check", str(path), "--as", "prompt"])
    said = capsys.readouterr().out
    assert "\\ud800\\x1b[2J" in said
    assert "k" * 100 not in said


def without_place(reader, message):
    reader.skipped.append(message.partition(": ")[2])


@pytest.mark.parametrize(
    ("kind", "where", "name", "instead"),
    [
        ("document", Reader, "_tolerate", without_place),
        ("dialogue", readers, "printable", lambda text, most: text),
        ("document", records, "_check_text", lambda key, value, blank=False: None),
        ("document", FileReader, "_records", lambda self, line, objects: ([], None)),
    ],
)
def test_the_check_sees_what_is_wrong(tmp_path, monkeypatch, kind, where, name, instead):
    monkeypatch.setattr(where, name, instead)
    with pytest.raises((AssertionError, InputError)):
        hostile_rows.check(tmp_path, kind, 200, random.Random(1))
