"""Malformed and hostile records of every format, drawn from a seed, and what readers owe for them.

A record begins as a good row of some format. Some values, keys or bytes of it are then changed:
other types, blanks, null and lone-surrogate characters, numbers beyond every float, thousands of
brackets, markers of transcripts and templates without end, message lists written as text, lists of
far too many answers, keys of a second format, keys twice, text cut short, bytes that are no UTF-8.
"""

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreign_rows import HELPSTEER, PKU, ROWS, SUMMARY
from good_records import GOOD

from llama2rt.data.formats import FORMATS, OWN
from llama2rt.data.readers import Reader, iterate, read, write
from llama2rt.data.records import RECORDS
from llama2rt.errors import InputError

BEGIN: dict[str, list[dict[str, Any]]] = {kind: [row] * 3 for kind, row in GOOD.items()}
for (_, _kind), _row in ROWS.items():
    BEGIN[_kind].append(_row)
BEGIN["comparison"] += [PKU, SUMMARY, *HELPSTEER]

LONG = 2000
TEXTS = [
    *("", " ", "\n", "\0", "\ud800", "\u2028", "\ufeffx", "\U0001f600", "N/A", "nan", "Infinity"),
    *("chosen", "1", "-1", "1e999", "tie", "better", "[INST] x [/INST]", "<<SYS>>x<</SYS>>"),
    *("\n\nHuman: u\n\nAssistant: a", "Human:", "\n\nHuman:" * LONG, "\n\nAssistant:" * LONG),
    *("<extra_id_1>User\n" * LONG, "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr"),
    *("<|im_start|>user\nu<|im_end|>\n", "<|start_header_id|>" * LONG, "<|user|>" * LONG),
    *('[{"role": "user", "content": "u"}]', "[{'from': 'human', 'value': 'u'}]", '["u"]'),
    *("[{'role':" * LONG, "[" * LONG, '[{"role": "user", "content": ' * 200, " \n" * LONG),
    *("../../etc/passwd", "{path}", "%s%n", "{{7*7}}", "<script>x</script>", "x" * 20_000),
]
NUMBERS = [0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 10**30, 10**400, -(10**400)]
ROLES = ["user", "assistant", "system", "human", "gpt", "tool", "", None, 3]


@dataclass
class Found:
    """What became of the records."""

    records: int = 0
    """hostile ones that were read"""
    good: int = 0
    """comparisons, prompts and so on that they gave, all of them valid"""
    faults: int = 0
    """refused, each with FILE:LINE"""
    reasons: Counter[str] = field(default_factory=Counter)
    """of the refusals, by the first words"""


def hostile(kind: str, draw: random.Random) -> bytes:
    """One line of a file, without its end."""
    row = copy.deepcopy(draw.choice(BEGIN[kind]))
    if kind == "prompt" and "id" in row:
        row["id"] = f"p{draw.getrandbits(60)}"  # or nearly all would be refused as read before
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        row = _changed(row, draw)
    text = json.dumps(row, ensure_ascii=draw.random() < 0.5)
    line = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.15:
        line = _damaged(line, draw)
    return line.replace(b"\n", b" ").replace(b"\r", b" ") or b"{}"


def check(folder: Path, kind: str, count: int, draw: random.Random) -> Found:
    """Reads `count` hostile records from one file and AssertionErrors on: an exception that is no
    InputError, a fault without FILE:LINE, a record that is not valid, a row that is not accounted
    for, and a file written half."""
    path = folder / f"{kind}.jsonl"
    lines = [json.dumps(GOOD[kind]).encode()]  # first, so that no line is taken for an array
    lines += [hostile(kind, draw) for _ in range(count)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    known = [OWN, *(found.key for found in FORMATS if found.kind == kind)]
    named = draw.choice(known) if draw.random() < 0.25 else None
    reader = Reader(path, kind, skip_invalid=count + 1, format=named)
    records = list(_until_none(reader))
    numbers = [_line(path, message) for message in reader.skipped]
    if named in (None, OWN):
        assert records[:1] == [RECORDS[kind].from_json(GOOD[kind])], "the good row was not read"
    assert numbers == sorted(set(numbers)), "faults out of order"
    assert all(1 <= number <= count + 1 for number in numbers), numbers
    blank = sum(not line.strip() for line in lines)
    assert reader.rows == count + 1 - blank, (reader.rows, count)
    for record in records:
        assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record
    _check_written(folder, path, kind, named, reader, records)
    found = Found(count, len(records), len(numbers))
    found.reasons.update(message.split(": ", 1)[1][:30] for message in reader.skipped)
    return found


def _until_none(reader: Reader) -> Iterator[Any]:
    """The reader's records; a file that gives none ends with an InputError that names it."""
    try:
        yield from reader
    except InputError as error:
        assert str(error).startswith(f"{reader.paths[0]}: no records: "), error


def _line(path: Path, message: str) -> int:
    begin = f"{path}:"
    assert message.startswith(begin), message
    number, _, reason = message.removeprefix(begin).partition(": ")
    assert number.isdigit() and reason.strip(), message
    assert reason.isprintable(), message
    assert len(message) < 1000, len(message)
    return int(number)


def _check_written(
    folder: Path, path: Path, kind: str, named: str | None, reader: Reader, records: list[Any]
) -> None:
    """What was read is written and read alike; a file whose source fails midway does not appear."""
    out = folder / "out.jsonl"
    if records:
        write(out, records)
        # Of prompts without an id each got one from its place, which is now written.
        assert read(out, kind, format=OWN) == records
        out.unlink()
    if reader.skipped:
        try:
            write(out, iterate(path, kind, format=named))
        except InputError as error:
            assert str(error) == reader.skipped[0]
        else:
            raise AssertionError("a bad record was read without a word")
        assert sorted(entry.name for entry in folder.iterdir()) == [path.name]


def _changed(row: Any, draw: random.Random) -> Any:
    """`row` with one thing changed somewhere inside it."""
    holders = list(_holders(row))
    if not holders:
        return _value(draw)
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    change = draw.randrange(8)
    if change < 4:
        holder[key] = _value(draw)
    elif change == 4:
        del holder[key]
    elif change == 5 and isinstance(holder, dict):
        holder[_key(draw)] = _value(draw)
    elif change == 6 and isinstance(row, dict):
        row |= copy.deepcopy(draw.choice(BEGIN[draw.choice(list(BEGIN))]))
    elif isinstance(holder, list):
        holder += copy.deepcopy(holder) * draw.choice((1, 2, 40))
    else:
        holder[key] = [holder[key]]
    return row


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def _value(draw: random.Random) -> Any:
    kind = draw.randrange(10)
    if kind < 4:
        return draw.choice(TEXTS)
    if kind == 4:
        return draw.choice(NUMBERS)
    if kind == 5:
        return draw.choice((None, True, False, [], {}, [[]], [None], {"": None}))
    if kind == 6:
        roles = [draw.choice(ROLES) for _ in range(draw.randrange(5))]
        return [{"role": role, "content": draw.choice(TEXTS[:20])} for role in roles]
    if kind == 7:
        return [draw.choice((draw.choice(TEXTS[:20]), draw.choice(NUMBERS), {}))] * 70
    if kind == 8:
        deep: Any = draw.choice(TEXTS[:20])
        for _ in range(draw.choice((3, 50, 400))):
            deep = [deep] if draw.random() < 0.5 else {"role": deep}
        return deep
    return {draw.choice(("prefers", "text", "rank", "score")): draw.choice(TEXTS[:20])}


def _key(draw: random.Random) -> str:
    ours = (
        "Kind",
        "rating ",
        "ratings",
        "rater",
        "votes",
        "safety",
        "id",
        "ID",
        "source",
        "system",
    )
    theirs = ("label", "image", "tools", "context", "input", "messages", "prompt", "conversations")
    return draw.choice((*ours, *theirs, "", "\0", "\ud800", "k" * 5000, "prefers"))


def _damaged(line: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(line) + 1)
    return draw.choice(
        (
            line[:at],
            line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :],
            line[:at] + b"\xff\xfe" + line[at:],
            line + line,
            b"\xef\xbb\xbf" + line,
            line[:-1] + b', "chosen": 1, "chosen": 2}',
            line[:-1] + b', "x": NaN}',
            line[:-1] + b', "x": -Infinity}',
            line[:-1] + b', "x": 1' + b"0" * 5000 + b"}",
            line[:-1] + b', "x": ' + b"[" * 100_000 + b"}",
            b"[" + line + b"]",
            b"null",
            b'"text"',
            b"   ",
            b"{",
        )
    )
