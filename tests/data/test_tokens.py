"""Token files: what is on disk, what a damaged one says, splits and shares."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data import tokens
from llama2rt.data.records import Document
from llama2rt.data.tokens import TokenFile
from llama2rt.errors import InputError

TEXTS = ["the quick fox", "1 2 3\n\nhé😀", "over the lazy dogs and over again", "</s>"]


@pytest.fixture
def token_file(small_tokenizer, tmp_path):
    return tokens.build([Document(text) for text in TEXTS], small_tokenizer, tmp_path / "c.tokens")


def test_the_stream_is_bos_text_eos(small_tokenizer, token_file):
    expected = [i for text in TEXTS for i in small_tokenizer.encode(text, bos=True, eos=True)]
    assert token_file.ids().tolist() == expected
    assert token_file.ids().dtype == np.uint16
    assert len(token_file) == len(expected)
    assert token_file.documents == 4
    assert token_file.text_bytes == sum(len(text.encode()) for text in TEXTS)
    token_file.require(small_tokenizer)


def test_building_twice_gives_the_same_bytes(small_tokenizer, token_file, tmp_path):
    tokens.build(iter(TEXTS), small_tokenizer, tmp_path / "again.tokens")
    assert (tmp_path / "again.tokens").read_bytes() == token_file.path.read_bytes()


def test_many_documents_keep_their_order(small_tokenizer, tmp_path):
    texts = [f"number {i}" for i in range(700)]  # more than are tokenised at once
    built = tokens.build(texts, small_tokenizer, tmp_path / "many.tokens")
    expected = [i for text in texts for i in small_tokenizer.encode(text, bos=True, eos=True)]
    assert built.ids().tolist() == expected
    assert built.documents == 700


def test_wide_vocabularies_take_four_bytes(small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(small_tokenizer, "vocab_size", 128256)
    built = tokens.build(TEXTS, small_tokenizer, tmp_path / "wide.tokens")
    assert built.ids().dtype == np.uint32
    assert built.ids()[0] == small_tokenizer.bos


def test_a_failed_build_leaves_nothing(small_tokenizer, tmp_path):
    def failing():
        yield "fine"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        tokens.build(failing(), small_tokenizer, tmp_path / "c.tokens")
    with pytest.raises(InputError, match="no documents"):
        tokens.build([], small_tokenizer, tmp_path / "c.tokens")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(token_file, tmp_path):
    from llama2rt.text import Tokenizer

    other = Tokenizer.train(["other words make another tokenizer"], 290, tmp_path)
    with pytest.raises(InputError, match="made with another tokenizer"):
        token_file.require(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "damaged: "),
        (lambda data: data + b"x", "damaged: "),
        (lambda data: data[:500], "damaged: 500 bytes, expected"),
        (lambda data: b"", "not a token file"),
        (lambda data: b"text " * 300, "not a token file"),
        (lambda data: data.replace(b"tokens-1", b"tokens-9"), "not a token file"),
        (lambda data: data.replace(b"uint16", b"object").replace(b"<u2", b"zz9"), "not a token"),
    ],
)
def test_damaged_files_are_refused(token_file, damage, message):
    token_file.path.write_bytes(damage(token_file.path.read_bytes()))
    with pytest.raises(InputError, match=message):
        TokenFile(token_file.path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"absent: cannot be opened \(No such file"):
        TokenFile(tmp_path / "absent")


def test_the_header_is_readable(token_file):
    header = json.loads(token_file.path.read_bytes()[: tokens.HEADER_BYTES])
    assert header["tokens"] == len(token_file)


@pytest.mark.parametrize("context", [3, 8, 1000])
def test_batches_predict_every_token_but_bos_once(small_tokenizer, token_file, context):
    predicted, documents = [], []
    for batch in token_file.batches(context, 2 * context):
        assert len(batch.tokens) <= 2 * context
        predicted += batch.targets[batch.targets >= 0].tolist()
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            documents.append(batch.tokens[a:b].tolist())
            assert b - a <= context
            assert batch.positions[a:b].tolist() == list(range(b - a))
    ids = token_file.ids().tolist()
    assert predicted == [i for i in ids if i != small_tokenizer.bos]
    assert [i for document in documents for i in document] == ids[:-1]
    for document in documents:  # isolated: a BOS only ever begins one
        assert small_tokenizer.bos not in document[1:]


lines = st.text("ab é\n", max_size=40)


@given(st.lists(lines, min_size=1, max_size=5), st.floats(0.05, 0.95))
def test_split_loses_nothing_and_cuts_at_lines(texts, held_out):
    try:
        first, last = tokens.split(texts, held_out)
    except InputError:
        return
    joined = "".join(d.text for d in first) + "".join(d.text for d in last)
    assert "".join(joined.split()) == "".join("".join(texts).split())
    whole = sum(len(text.encode()) for text in texts)
    longest = max(len(line.encode()) + 1 for text in texts for line in text.split("\n"))
    blank = sum(len(text) for text in texts if not text.strip())
    kept = sum(len(d.text.encode()) for d in last)
    slack = longest + blank + sum(text.count("\n") + text.count(" ") for text in texts)
    assert abs(kept - held_out * whole) <= slack


def test_split_of_a_single_file_holds_out_its_last_tenth():
    text = "".join(f"line {i:03}\n" for i in range(100))
    [first], [last] = tokens.split([Document(text, "x.txt")], 0.1)
    assert first.text == text[:810]
    assert last.text == text[810:]
    assert first.source == last.source == "x.txt"


def test_one_endless_line_is_cut_after_a_word():
    [first], [last] = tokens.split(["word " * 200], 0.1)
    assert (first.text, last.text) == ("word " * 180, "word " * 20)


def test_split_errors():
    with pytest.raises(InputError, match="held_out must lie between 0 and 1"):
        tokens.split(["a\nb"], 1.0)
    with pytest.raises(InputError, match="too little text"):
        tokens.split(["one line"], 0.1)


def test_shares():
    assert tokens.shares([10, 20], None) == [10, 20]
    assert tokens.shares([10, 20], [1, 1]) == [15, 15]
    assert tokens.shares([3, 3, 4], [1, 1, 1]) == [4, 3, 3]
    assert tokens.shares([2, 4, 4], [0.26, 0.36, 0.38]) == [3, 3, 4]  # the largest remainders
    assert sum(tokens.shares([7, 11, 13], [0.1, 0.2, 0.33])) == 31
    with pytest.raises(InputError, match="2 mixture weights for 1 files"):
        tokens.shares([3], [1, 2])
    with pytest.raises(InputError, match="must be positive"):
        tokens.shares([3, 3], [1, 0])
    with pytest.raises(InputError, match="must be positive"):
        tokens.shares([3, 3], [1, float("nan")])


def by_hand(stream, begin, length):
    """(tokens, targets, positions) of a window, id by id."""
    ids = stream.ids().tolist()
    found, position = [], 0
    for at in range(begin, begin + length):
        token, target = ids[at % (len(ids) - 1)], ids[at % (len(ids) - 1) + 1]
        position = 0 if token == stream.bos or at == begin else position + 1
        found.append((token, -1 if target == stream.bos else target, position))
    return found


@given(st.data())
def test_packed_windows_by_hand(data):
    draw = data.draw
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        windows = []
        for _ in range(draw(st.integers(1, 3))):
            texts = draw(st.lists(st.lists(st.integers(3, 9), max_size=6), min_size=1, max_size=4))
            ids = np.array([i for text in texts for i in (1, *text, 2)], np.uint16)
            stream = tokens.TokenStream(ids, 1, 0)
            begin = draw(st.integers(0, len(ids) - 2))
            windows.append((stream, begin, draw(st.integers(1, len(ids) - 1))))
        groups.append(windows)
    for windows, batch in zip(groups, tokens.pack_groups(groups), strict=True):
        expected = [row for window in windows for row in by_hand(*window)]
        columns = (batch.tokens.tolist(), batch.targets.tolist(), batch.positions.tolist())
        assert list(zip(*columns, strict=True)) == expected
        starts = [i for i, (*_, position) in enumerate(expected) if position == 0]
        assert batch.cu_seqlens.tolist() == [*starts, len(expected)]
        assert batch.weight == sum(target >= 0 for _, target, _ in expected)
        assert (batch.tokens.dtype, batch.positions.dtype) == (torch.int64, torch.int32)
