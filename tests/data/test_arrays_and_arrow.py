"""The same rows as JSON lines, as a JSON array, as Parquet and as a saved dataset read alike."""

import gzip
import json

import json_lines
import pytest
from foreign_rows import ROWS
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data import arrow
from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Dialogue, Document, Prompt
from llama2rt.errors import InputError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
# Rows of mixed shapes, which have no Arrow type of their own; (kind, rows, number of records).
MIXED = {
    "prompts": ("prompt", [{"prompt": "hi"}, {"prompt": [USER]}]),
    "comparisons": (
        "comparison",
        [
            {"prompt": "hi", "chosen": "c", "rejected": "r", "rating": "better"},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
        ],
    ),
    "dialogues": (
        "dialogue",
        [
            {"messages": [USER, ANSWER], "meta": {"n": 1}},
            {"messages": [USER, ANSWER, USER, ANSWER], "meta": "none"},
        ],
    ),
    "samples": (
        "sample",
        [
            {"prompt_id": "1", "messages": [USER], "response": "r", "scores": {"a": 1.5}},
            {"prompt_id": "2", "messages": [USER], "response": "r", "scores": None},
        ],
    ),
}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz"])
def test_an_array_reads_as_lines_do(tmp_path, name):
    for kind, rows in MIXED.values():
        json_lines.write(tmp_path / "lines.jsonl", rows)
        data = ("\n " + json.dumps(rows, indent=1) + "\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        expected, found = (
            [r.to_json() | {"id": ""} for r in read(tmp_path / file, kind)]
            for file in ("lines.jsonl", name)
        )
        assert found == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text": "t"}, {"text": " "}]', ":2: text is blank"),
        ('[{"text": "t"}, 3]', ":2: expected a JSON object, got a number"),
        ('[{"text": "t"}, {"text": "t", "text": "u"}]', ":2: key 'text' occurs twice"),
        ('[{"text": "t", "n": [NaN]}]', ":1: NaN is not a number that JSON or we accept"),
        ('[{"text": "t"}\n {"text": "t"}]', ":2: invalid JSON: no comma or ] before it"),
        ('[{"text": "t"},\n {"text": }]', ":2: invalid JSON: Expecting value at column 11, line 2"),
        ('[{"text": "t"}', ":2: invalid JSON: no comma or ] before it"),
        ('[{"text": "t"},', ":2: invalid JSON: Expecting value"),
        ('[{"text": "t"}] []', ":2: invalid JSON: '[]' behind the array"),
        ("[" * 100_000, ":1: invalid JSON: nested too deeply"),
        ("[]", ":1: no records: the file is empty"),
        ("[", ":1: invalid JSON: Expecting value"),
    ],
)
def test_a_bad_array_is_named_by_its_record(tmp_path, text, reason):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read(path, "document")
    assert str(error.value).startswith(f"{path}{reason}")


def test_bad_items_of_an_array_can_be_skipped(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"}, {"text": "t", "text": "u"}, null, {"text": "b"}]')
    assert read(path, "document", skip_invalid=2) == [Document("a"), Document("b")]


@given(st.binary(max_size=60))
def test_random_bytes_behind_a_bracket_never_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "x.json"
    path.write_bytes(b'[{"text": "t"}' + content)
    try:
        read(path, "document")
    except InputError as error:
        assert str(path) in str(error)


def as_lines(records):
    """Records without what a file's name gives them."""
    return [{**record.to_json(), "id": ""} for record in records]


def save(folder, table):
    """A table as `datasets.Dataset.save_to_disk` lays it out."""
    import pyarrow

    folder.mkdir()
    with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def json_column(pyarrow, values):
    """JSON text as datasets 5 writes what it cannot type."""
    texts = [None if value is None else json.dumps(value) for value in values]
    return pyarrow.array(texts, pyarrow.string()).cast(pyarrow.json_())


@pytest.mark.parametrize("mixed", MIXED)
def test_json_columns_read_as_the_lines_do(tmp_path, mixed):
    """All columns of Arrow's JSON type: the text "hi" stands there in quotes, a list as JSON."""
    pyarrow = pytest.importorskip("pyarrow", "19")
    from pyarrow import parquet

    kind, rows = MIXED[mixed]
    json_lines.write(tmp_path / "x.jsonl", rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = pyarrow.table(
        {key: json_column(pyarrow, [row.get(key) for row in rows]) for key in keys}
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    expected = as_lines(read(tmp_path / "x.jsonl", kind))
    assert as_lines(read(tmp_path / "x.parquet", kind)) == expected
    assert as_lines(read(save(tmp_path / "saved", table), kind)) == expected


def test_json_inside_lists_and_structs(tmp_path):
    """datasets 5 types as JSON only the part of a column that it must."""
    pyarrow = pytest.importorskip("pyarrow", "19")
    from pyarrow import parquet

    kind = pyarrow.json_()
    listed = pyarrow.ListArray.from_arrays(
        [0, 2], pyarrow.array([json.dumps(USER), json.dumps(ANSWER)]).cast(kind)
    )
    table = pyarrow.table({"messages": listed})
    parquet.write_table(table, tmp_path / "x.parquet")
    expected = [Dialogue([USER, ANSWER])]
    assert read(tmp_path / "x.parquet", "dialogue") == expected
    assert read(save(tmp_path / "saved", table), "dialogue") == expected

    inner = pyarrow.StructArray.from_arrays(
        [pyarrow.array(['"user"']).cast(kind), pyarrow.array(['"q"']).cast(kind)],
        ["role", "content"],
    )
    table = pyarrow.table({"prompt": pyarrow.ListArray.from_arrays([0, 1], inner)})
    assert read(save(tmp_path / "structs", table), "prompt") == [Prompt("structs:1", [USER])]


def test_json_columns_are_known_by_metadata_where_pyarrow_has_no_such_type():
    pyarrow = pytest.importorskip("pyarrow")
    named = {b"ARROW:extension:name": b"arrow.json"}
    features = {"a": {"_type": "Json"}, "b": {"_type": "List", "feature": {"_type": "Json"}}}
    text = pyarrow.string()
    schema = pyarrow.schema(
        [
            pyarrow.field("a", text),
            pyarrow.field("b", pyarrow.list_(text)),
            pyarrow.field("c", pyarrow.struct([pyarrow.field("d", text, metadata=named)])),
            pyarrow.field("plain", text),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    decoders = arrow.decoders(schema)
    assert decoders.keys() == {"a", "b", "c"}
    assert decoders["a"]('"hi"') == "hi"
    assert decoders["b"](["[1]", None, "null"]) == [[1], None, None]
    assert decoders["c"]({"d": '{"e": 1}'}) == {"d": {"e": 1}}
    assert [decoders[name](None) for name in "abc"] == [None] * 3
    with pytest.raises(InputError, match=r"b\[\]: key 'x' occurs twice"):
        decoders["b"](['{"x": 1, "x": 2}'])


def test_damaged_json_text_is_a_bad_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", "19")
    from pyarrow import parquet

    column = pyarrow.array(['"a"', '"a', '"b"']).cast(pyarrow.json_())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet:2: text: invalid JSON: Unterminated string"):
        read(tmp_path / "x.parquet", "document")
    found = read(tmp_path / "x.parquet", "document", skip_invalid=1)
    assert [document.text for document in found] == ["a", "b"]


@pytest.mark.parametrize("mixed", MIXED)
def test_what_datasets_makes_of_mixed_rows_reads_as_the_lines_do(tmp_path, monkeypatch, mixed):
    datasets = pytest.importorskip("datasets")
    kind, rows = MIXED[mixed]
    json_lines.write(tmp_path / "x.jsonl", rows)
    try:
        made = datasets.load_dataset(
            "json",
            data_files=str(tmp_path / "x.jsonl"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
    except datasets.exceptions.DatasetGenerationError:
        pytest.skip(f"datasets {datasets.__version__} has no type for rows of mixed shapes")
    made.to_parquet(str(tmp_path / "x.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    expected = as_lines(read(tmp_path / "x.jsonl", kind))
    assert as_lines(read(tmp_path / "x.parquet", kind)) == expected
    assert as_lines(read(tmp_path / "saved", kind)) == expected


@pytest.mark.parametrize(
    ("kind", "row", "key"),
    [
        ("dialogue", {"prompt": "when?", "completion": "?"}, "completion"),
        ("dialogue", {"question": "when?", "answer": "?"}, "answer"),
        ("comparison", {"prompt": "when?", "chosen": "?", "rejected": "r"}, "chosen"),
        ("comparison", {**ROWS["SHP", "comparison"], "human_ref_B": "?"}, "human_ref_B"),
        ("prompt", {"prompt": "?"}, "prompt"),
        ("prompt", {"prompt": "u", "id": "?"}, "id"),
        ("document", {"text": "?"}, "text"),
        ("dialogue", {"messages": [USER, {"role": "assistant", "content": "?"}]}, "messages"),
        ("comparison", {"prompt": "u", "chosen": "c", "rejected": "r", "rating": "?"}, "rating"),
    ],
)
def test_answers_that_became_timestamps_are_refused_by_name(tmp_path, kind, row, key):
    """A program that guesses types takes a column of dates for dates; the text is lost with it."""
    pyarrow = pytest.importorskip("pyarrow")
    import datetime

    from pyarrow import parquet

    def dated(value):
        if isinstance(value, dict):
            return {k: dated(v) for k, v in value.items()}
        if isinstance(value, list):
            return [dated(v) for v in value]
        return datetime.datetime(2024, 1, 2) if value == "?" else value

    # Messages of one list share a type: there, the user's text is a date too.
    plain = dated(row)
    if key == "messages":
        plain["messages"][0] = {**USER, "content": datetime.datetime(2024, 1, 1)}
    parquet.write_table(pyarrow.Table.from_pylist([plain]), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=rf"x\.parquet:1: {key}:.* a timestamp") as error:
        read(tmp_path / "x.parquet", kind)
    assert "datetime" not in str(error.value)


def test_a_timestamp_that_nothing_reads_is_a_key_not_used(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import datetime

    from pyarrow import parquet

    rows = [{"text": "t", "crawled": datetime.datetime(2024, 1, 2)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    reader = Reader(tmp_path / "x.parquet", "document")
    assert list(reader) == [Document("t")]
    assert reader.ignored_keys == {"crawled": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", "{"),
        ("state.json", "[]"),
        ("state.json", '{"_data_files": [{"name": "a.arrow"}]}'),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}'),
        ("dataset_dict.json", "x"),
        ("dataset_dict.json", "{}"),
        ("dataset_dict.json", '{"splits": 3}'),
    ],
)
def test_a_damaged_saved_dataset_is_named(tmp_path, name, content):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: damaged: expected the names of what"):
        read(tmp_path, "comparison")


def test_a_date_that_python_cannot_hold_is_one_bad_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    table = {"prompt": ["p", "q"], "when": pa.array([2**62, 0], pa.timestamp("us"))}
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError, match=r"x\.parquet:1: when: a value that cannot be read"):
        read(path, "prompt")
    assert [prompt.id for prompt in read(path, "prompt", skip_invalid=1)] == ["x.parquet:2"]
