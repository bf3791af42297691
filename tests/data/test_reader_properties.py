"""Readers and writers by Hypothesis: what is written is read, and nothing crashes a reader."""

import json

import pytest
from good_records import GOOD, changed
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt.data.readers import read, write
from llama2rt.data.records import (
    KINDS,
    RATINGS,
    SAFETY,
    Comparison,
    Dialogue,
    Document,
    Prompt,
    Sample,
)
from llama2rt.errors import InputError
from llama2rt.text import chat

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
said = text.filter(str.strip)
content = said.filter(lambda value: not any(tag in value for tag in chat.TAGS))


@st.composite
def messages(draw, last):
    count = 2 * draw(st.integers(1, 2)) - (last == "user")
    roles = ["user", "assistant"]
    result = [{"role": roles[i % 2], "content": draw(content)} for i in range(count)]
    return draw(st.sampled_from([[], [{"role": "system", "content": draw(content)}]])) + result


number = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
comparisons = st.builds(
    Comparison,
    messages("user"),
    said,
    said,
    rating=st.none() | st.sampled_from(RATINGS),
    safety=st.none() | st.sampled_from(SAFETY),
    kind=st.sampled_from(KINDS),
    source=text,
).filter(lambda c: c.chosen.strip() != c.rejected.strip())
samples = st.builds(
    Sample,
    said,
    messages("user"),
    text,
    scores=st.dictionaries(text, number, max_size=2),
    reward=st.none() | number,
    policy=text,
    temperature=st.none() | st.floats(0, 10),
    seed=st.none() | st.integers(0, 2**63),
)
RECORDS = [
    ("document", st.builds(Document, said, text)),
    ("dialogue", st.builds(Dialogue, messages("assistant"), text)),
    ("prompt", st.builds(Prompt, said, messages("user"), st.sampled_from(KINDS))),
    ("comparison", comparisons),
    ("sample", samples),
]


@pytest.mark.parametrize(("kind", "records"), RECORDS, ids=[kind for kind, _ in RECORDS])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_written_is_read(tmp_path_factory, kind, records, suffix):
    folder = tmp_path_factory.mktemp("written")

    @settings(max_examples=30)
    @given(st.lists(records, min_size=1, max_size=4, unique_by=lambda r: getattr(r, "id", id(r))))
    def written_and_read(some):
        path = folder / f"x.jsonl{suffix}"
        write(path, some)
        assert read(path, kind) == some

    written_and_read()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_no_change_to_a_record_gets_past_or_crashes_the_reader(tmp_path_factory, data):
    """Any value under any key: either a record that reads the same again, or InputError with
    FILE:LINE, never another exception."""
    kind = data.draw(st.sampled_from(sorted(GOOD)))
    key = data.draw(st.sampled_from(sorted(GOOD[kind])))
    value = data.draw(json_values | st.just(...))
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    path.write_text(json.dumps(changed(kind, **{key: value})))
    try:
        [record] = read(path, kind)
    except InputError as error:
        assert str(error).startswith(f"{path}:1: ")
    else:
        assert type(record).from_json(record.to_json()) == record


@given(st.binary(max_size=60), st.sampled_from(["x.jsonl", "x.jsonl.gz", "x.txt"]))
def test_random_bytes_never_crash_the_reader(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        read(path, "document")
    except InputError as error:
        assert str(path) in str(error)
