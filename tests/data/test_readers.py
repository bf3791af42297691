"""Readers: what is accepted, and FILE:LINE: reason for every kind of bad record."""

import gzip
import json
import logging
import math

import pytest
from good_records import ANSWER, GOOD, USER, changed

from llama2rt.data.readers import Reader, iterate, read, write
from llama2rt.data.records import Comparison, Document, Sample
from llama2rt.errors import InputError

BAD_RECORDS = [
    ("document", changed("document", text=...), "missing key 'text'"),
    ("document", changed("document", text=3), "text: expected text, got a number"),
    ("document", changed("document", text=None), "missing key 'text'"),
    ("document", changed("document", text=" \n"), "text is blank"),
    ("document", changed("document", text="a\0b"), "text: holds a null character"),
    ("document", changed("document", text="a\ud800b"), "text: lone surrogate at character 1"),
    ("document", changed("document", source=[]), "source: expected text, got a list"),
    ("document", {"texts": "t"}, "unknown key 'texts': did you mean 'text'?"),
    ("dialogue", changed("dialogue", messages=...), "missing key 'messages'"),
    ("dialogue", changed("dialogue", messages=[]), "messages: no messages"),
    (
        "dialogue",
        changed("dialogue", messages="u"),
        "messages: expected a list of messages, got text",
    ),
    (
        "dialogue",
        changed("dialogue", messages={"role": "user"}),
        "messages: expected a list of messages, got an object",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[USER]),
        "messages: the last message must be from the assistant, not the user",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[USER, USER, ANSWER]),
        "messages: message 2: expected role assistant, got user",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[ANSWER]),
        "messages: message 1: expected role user, got assistant",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[USER, {"role": "assistant", "content": " "}]),
        "messages: message 2: assistant content is blank",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[{"role": "human", "content": "u"}, ANSWER]),
        "messages: message 1: role 'human' is not system, user or assistant",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[USER, {"role": "assistant", "content": "x\0"}]),
        "messages: message 2 content: holds a null character",
    ),
    (
        "dialogue",
        changed("dialogue", messages=[{"role": "user", "content": "[INST]"}, ANSWER]),
        "messages: message 1: user content holds the format tag [INST]",
    ),
    ("prompt", changed("prompt", id=...), "missing key 'id'"),
    ("prompt", changed("prompt", id=7), "id: expected text, got a number"),
    ("prompt", changed("prompt", id=""), "id is blank"),
    (
        "prompt",
        changed("prompt", messages=[USER, ANSWER]),
        "messages: the last message must be from the user, not the assistant",
    ),
    (
        "prompt",
        changed("prompt", kind="harm"),
        "kind: expected one of helpfulness, safety; got 'harm'",
    ),
    ("comparison", changed("comparison", chosen=...), "missing key 'chosen'"),
    ("comparison", changed("comparison", rejected=...), "missing key 'rejected'"),
    ("comparison", changed("comparison", prompt=...), "missing key 'prompt'"),
    ("comparison", changed("comparison", chosen=" "), "chosen is blank"),
    ("comparison", changed("comparison", rejected=""), "rejected is blank"),
    ("comparison", changed("comparison", rejected=None), "missing key 'rejected'"),
    (
        "comparison",
        changed("comparison", chosen="same", rejected=" same\n"),
        "chosen and rejected are equal",
    ),
    (
        "comparison",
        changed("comparison", rating="best"),
        "rating: expected one of significantly_better, better, slightly_better, "
        "negligibly_better; got 'best'",
    ),
    ("comparison", changed("comparison", rating=1), "rating: expected one of"),
    (
        "comparison",
        changed("comparison", safety="safe"),
        "safety: expected one of chosen_safe, both_safe, both_unsafe; got 'safe'",
    ),
    ("comparison", changed("comparison", kind=["safety"]), "kind: expected one of"),
    (
        "comparison",
        changed("comparison", rating=..., ratting="better"),
        "unknown key 'ratting': did you mean 'rating'?",
    ),
    ("sample", changed("sample", prompt_id=...), "missing key 'prompt_id'"),
    ("sample", changed("sample", response=...), "missing key 'response'"),
    ("sample", changed("sample", response=None), "missing key 'response'"),
    (
        "sample",
        changed("sample", scores=[1]),
        "scores: expected an object of numbers, got a list",
    ),
    (
        "sample",
        changed("sample", scores={"h": "high"}),
        "scores.h: expected a number, got text",
    ),
    (
        "sample",
        changed("sample", scores={"h": True}),
        "scores.h: expected a number, got true or false",
    ),
    ("sample", changed("sample", reward="1"), "reward: expected a number, got text"),
    ("sample", changed("sample", temperature=-0.1), "temperature: expected at least 0, got -0.1"),
    ("sample", changed("sample", seed=1.5), "seed: expected an integer, got a number"),
]

BAD_LINES = [
    (b'{"text": "t"', "invalid JSON: "),
    (b"text", "invalid JSON: Expecting value at column 1"),
    (b'{"text": "t"} {"text": "t"}', "invalid JSON: Extra data at column 15"),
    (b'{"text": "a\x00b"}', "invalid JSON: Invalid control character at column 12"),
    (b"\x00\x00", "invalid JSON: "),
    (b'{"text": "\xff"}', "not valid UTF-8 at byte 11 of the line"),
    (b'\xef\xbb\xbf{"text": "t"}', "starts with a byte-order mark"),
    (b'"text"', "expected a JSON object, got text"),
    (b"3", "expected a JSON object, got a number"),
    (b"null", "expected a JSON object, got null"),
    (b'[{"text": "t"}]', "expected a JSON object, got a list; write one object a line"),
    (b'{"text": "t", "n": NaN}', "NaN is not a number that JSON or we accept"),
    (b'{"text": "t", "n": -Infinity}', "-Infinity is not a number"),
    (b'{"text": "t", "text": "u"}', "key 'text' occurs twice"),
    (b"[" * 100_000, "invalid JSON: nested too deeply"),
    (b'{"text": "t", "n": ' + b"9" * 5000 + b"}", "invalid JSON: "),
]


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(("kind", "record", "reason"), BAD_RECORDS)
def test_every_bad_record_is_named(tmp_path, kind, record, reason):
    good = dict(GOOD[kind])
    path = write_lines(tmp_path / "x.jsonl", json.dumps(good).encode(), json.dumps(record).encode())
    with pytest.raises(InputError) as error:
        read(path, kind)
    assert str(error.value).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_every_bad_line_is_named(tmp_path, line, reason):
    path = write_lines(tmp_path / "x.jsonl", b'{"text": "good"}', b"", line)
    with pytest.raises(InputError) as error:
        read(path, "document")
    assert str(error.value).startswith(f"{path}:3: {reason}")
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 400])
def test_scores_that_are_no_numbers(tmp_path, number):
    line = json.dumps(changed("sample", reward=77)).replace("77", number)
    path = write_lines(tmp_path / "x.jsonl", line.encode())
    with pytest.raises(InputError, match=r"x\.jsonl:1: .*number"):
        read(path, "sample")


@pytest.mark.parametrize("kind", GOOD)
def test_good_records_come_back(tmp_path, kind):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD[kind]))
    [record] = read(path, kind)
    assert record.to_json() == GOOD[kind]
    required = {k: v for k, v in GOOD[kind].items() if k not in record.optional}
    assert type(record).from_json(required) == type(record)(**required)
    empty = {**required, **dict.fromkeys(record.optional)}  # null is absent, as Parquet writes it
    assert type(record).from_json(empty) == type(record)(**required)


def test_an_empty_response_is_a_sample_but_no_comparison(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(changed("sample", response="")))
    [sample] = read(path, "sample")
    assert sample.response == ""
    assert Sample.from_json(sample.to_json()) == sample
    with pytest.raises(InputError, match="rejected is blank"):
        Comparison.from_json(changed("comparison", rejected=sample.response))


def test_other_keys_are_ignored_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "t", "url": "u", "meta": {"n": 1}}\n{"text": "t", "url": "u"}\n')
    reader = Reader(path, "document")
    assert list(reader) == [Document("t")] * 2
    assert reader.ignored_keys == {"url": 2, "meta": 1}


def test_duplicate_ids_are_named_with_their_first_use(tmp_path):
    one, two = (
        write_lines(tmp_path / name, json.dumps(GOOD["prompt"]).encode()) for name in ("a", "b")
    )
    with pytest.raises(InputError) as error:
        read([one, two], "prompt")
    assert str(error.value) == f"{two}:1: duplicate id 'p', first used at {one}:1"


def test_prompts_without_ids_in_files_of_one_name(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_lines(tmp_path / folder / "train.jsonl", b'{"prompt": "hi"}'))
    assert [prompt.id for prompt in read(paths, "prompt")] == [f"{path}:1" for path in paths]
    assert [prompt.id for prompt in read(paths[0], "prompt")] == ["train.jsonl:1"]


def test_skip_invalid_tolerates_so_many_and_lists_each(tmp_path, caplog):
    good = b'{"text": "good"}'
    path = write_lines(tmp_path / "x.jsonl", b"bad", good, b'{"text": ""}', good, b"{}")
    with caplog.at_level(logging.WARNING):
        assert read(path, "document", skip_invalid=3) == [Document("good")] * 2
    assert [record.message.split(": ")[0] for record in caplog.records] == [
        f"skipped {path}:{line}" for line in (1, 3, 5)
    ]
    with pytest.raises(InputError) as error:
        read(path, "document", skip_invalid=2)
    assert str(error.value) == (
        f"{path}:5: missing key 'text' (keys found: none) "
        "(after 2 skipped, as many as skip_invalid allows)"
    )


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.jsonl.gz"])
def test_empty_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InputError, match=r":1: no records: the file is empty"):
        read(path, "document")


def test_nothing_but_skipped_records_is_no_file(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", b"bad")
    with pytest.raises(InputError, match="none of its rows gives one"):
        read(path, "document", skip_invalid=5)


def test_gzip_and_its_damages(tmp_path):
    records = [Document(f"text {i}" * 50) for i in range(50)]
    path = tmp_path / "x.jsonl.gz"
    write(path, records)
    assert read(path, "document") == records
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"x\.jsonl\.gz:\d+: truncated or damaged gzip data"):
        read(path, "document", skip_invalid=100)
    for at in range(10, len(whole), 5):  # behind the header, some of which means nothing
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"x\.jsonl\.gz:\d+: "):
            read(path, "document", skip_invalid=100)
    path.write_bytes(b'{"text": "not compressed"}')
    with pytest.raises(InputError, match=r"x\.jsonl\.gz:1: truncated or damaged gzip data"):
        read(path, "document")


def test_missing_and_unreadable_paths(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "absent.jsonl", "document")
    with pytest.raises(InputError, match="not a saved Hugging Face dataset"):
        read(tmp_path, "document")
    with pytest.raises(InputError, match="unknown kind 'dialog'"):
        read(tmp_path / "x.jsonl", "dialog")
    with pytest.raises(InputError, match="skip_invalid must be at least 0"):
        read(tmp_path / "x.jsonl", "document", skip_invalid=-1)


def test_text_files_are_one_document_or_cut_at_a_separator(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\n\ntwo\n<|end|>\nthree<|end|> \n<|end|>four\0")
    with pytest.raises(InputError, match=r"x\.txt:1: text: holds a null character"):
        read(path, "document")
    with pytest.raises(InputError, match=r"x\.txt:6: text: holds a null character"):
        read(path, "document", document_separator="<|end|>")
    documents = read(path, "document", skip_invalid=1, document_separator="<|end|>")
    assert [d.text for d in documents] == ["one\n\ntwo\n", "\nthree"]
    assert {d.source for d in documents} == {"x.txt"}
    path.write_text("one\n\ntwo")
    assert read(path, "document") == [Document("one\n\ntwo", "x.txt")]
    with pytest.raises(InputError, match=r"a \.txt file holds documents, not prompts"):
        read(path, "prompt")
    path.write_bytes(b"fine\nnot \xff fine")
    with pytest.raises(InputError, match=r"x\.txt:2: not valid UTF-8"):
        read(path, "document")
    path.write_bytes(b"\xef\xbb\xbffine")
    with pytest.raises(InputError, match=r"x\.txt:1: starts with a byte-order mark"):
        read(path, "document")


def test_windows_line_ends_are_fine(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [d.text for d in read(tmp_path / "x.jsonl", "document")] == ["a", "b"]


def test_reading_is_lazy(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", b'{"text": "good"}', b"bad")
    records = iterate(path, "document")
    assert next(records) == Document("good")
    with pytest.raises(InputError, match=r"x\.jsonl:2"):
        next(records)


def test_parquet_and_saved_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [GOOD["comparison"], changed("comparison", rating=None, safety=None)]
    expected = [Comparison.from_json(row) for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", "comparison") == expected

    folder = tmp_path / "saved"
    folder.mkdir()
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    assert read(folder, "comparison") == expected

    bad = pyarrow.Table.from_pylist([*rows, changed("comparison", chosen=" ")])
    parquet.write_table(bad, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet:3: chosen is blank"):
        read(tmp_path / "x.parquet", "comparison")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"x\.parquet: damaged Parquet file"):
        read(tmp_path / "x.parquet", "comparison")
    (folder / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"\.arrow: damaged Arrow file"):
        read(folder, "comparison")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="several splits; name one: train, test"):
        read(folder, "comparison")


def test_a_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a"}, {"text": "b"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert [d.text for d in read(tmp_path / "saved", "document")] == ["a", "b"]


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "folder" / "x.jsonl"
    write(path, [Document("é")])
    assert path.read_bytes() == '{"text": "é"}\n'.encode()
    bad = Sample("p", [USER], "r", reward=math.nan)
    with pytest.raises(InputError, match=r"x\.jsonl:2: cannot be written"):
        write(path, [Sample("p", [USER], "r"), bad])
    assert path.read_bytes() == '{"text": "é"}\n'.encode()
    assert list(path.parent.iterdir()) == [path]


def test_writing_gzip_is_deterministic(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write(tmp_path / name, [Document("t")])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
