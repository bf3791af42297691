"""Ids word by word are the library's, for every text; where they could not be, it is asked."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama2rt.text import Tokenizer, words
from llama2rt.text.words import WordEncoder

DTYPE = np.dtype("<u2")
texts = st.text(st.sampled_from("aeth \n\t.12é😀\u2581\u00a0\r\x00") | st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def encoder(small_tokenizer):
    found = WordEncoder(small_tokenizer, DTYPE)
    assert found.by_words
    return found


@given(st.lists(texts, max_size=4))
@example(["", " ", "  ", "\n", " \n ", "a  b", " a", "a ", "a \n\n b\n", "\u2581", "</s> <s>"])
def test_the_ids_are_the_librarys(encoder, given_texts):
    found = [ids.tolist() for ids in encoder(given_texts)]
    assert found == [encoder.tokenizer.encode(text) for text in given_texts]


def test_real_text_with_the_published_tokenizer(shared_data, monkeypatch):
    encoder = WordEncoder(Tokenizer.load(shared_data("llama_tokenizer.model")), DTYPE)
    assert encoder.by_words
    text = shared_data("tinyshakespeare.txt").read_text()[:200_000]
    pieces = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    monkeypatch.setattr(words, "MOST_WORDS", 3000)  # it forgets, and learns again
    for piece, ids in zip(pieces, encoder(pieces), strict=True):
        assert ids.tolist() == encoder.tokenizer.encode(piece)
    assert 0 < len(encoder._words) < 6000


def test_other_tokenizers_are_asked(small_tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer.as_json())
    other = Tokenizer.load(tmp_path)
    encoder = WordEncoder(other, DTYPE)
    assert not encoder.by_words
    assert next(encoder(["the fox\njumps"])).tolist() == other.encode("the fox\njumps")
