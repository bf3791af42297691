"""Two thousand malformed and hostile records: every one is read right or refused with FILE:LINE.

benchmarks/data/fuzz_readers.py reads a hundred thousand.
"""

import random

import hostile_rows
import pytest

from llama2rt.data import readers, records
from llama2rt.data.file_reader import FileReader
from llama2rt.data.readers import Reader
from llama2rt.errors import InputError


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
