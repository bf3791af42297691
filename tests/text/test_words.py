"""Ids word by word are the library's, for every text; where they could not be, it is asked."""

import gzip
import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama2rt.text import Tokenizer, words
from llama2rt.text.words import WordEncoder

DTYPE = np.dtype("<u2")
texts = st.text(
    st.sampled_from("aeth TH \n\t.,'(12é\u00b2😀\u201d\u2581\u00a0\r\x00")
    | st.characters(codec="utf-8")
)


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


@pytest.fixture(scope="module")
def published(shared_data):
    found = WordEncoder(Tokenizer.load(shared_data("llama_tokenizer.model")), DTYPE)
    assert found.by_words
    return found


@given(st.lists(texts, max_size=4))
@example(["don't (stop)", "caf\u00e9s, 1,234.50!", "\u00abbon\u00bb.\u201d x\u00e9y ..\u00e9"])
@example(["  12a\u00e93"])
def test_the_ids_are_the_published_ones(published, given_texts):
    found = [ids.tolist() for ids in published(given_texts)]
    assert found == [published.tokenizer.encode(text) for text in given_texts]


def real_texts(shared_data, name):
    path = shared_data(name)
    if name.endswith(".gz"):
        rows = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
        return [row["chosen"] for row in itertools.islice(rows, 500)]
    if name.endswith(".jsonl"):
        rows = map(json.loads, path.read_text().splitlines()[:2000])
        return [f"{row['question']}\n{row['answer']}" for row in rows]
    text = path.read_text()
    return [text[i : i + 5000] for i in range(0, len(text), 5000)]


@pytest.mark.parametrize(
    "name", ["tinyshakespeare.txt", "gsm8k_train.jsonl", "hh_harmless_base_test.jsonl.gz"]
)
def test_real_text_with_the_published_tokenizer(published, shared_data, monkeypatch, name):
    texts = real_texts(shared_data, name)
    monkeypatch.setattr(words, "MOST_WORDS", 3000)  # it forgets, and learns again
    expected = published.tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in published(texts)] == expected
    assert len(published._words) <= 3000 and len(published._parts) <= 3000


@pytest.fixture
def asked(small_tokenizer, monkeypatch):
    """(texts that the library is asked for, the new encoder that asks it)."""
    found, texts, encode = WordEncoder(small_tokenizer, DTYPE), [], small_tokenizer.encode

    def spy(text):
        texts.append(text)
        return encode(text)

    monkeypatch.setattr(small_tokenizer, "encode", spy)
    return texts, found


PROSE = "the fox jumps over the lazy dog, and the dog counts the sheep again\n" * 3


def test_words_are_remembered(asked):
    texts, encoder = asked
    [first] = encoder([PROSE])
    assert len(texts) == 1 and PROSE not in texts  # all new words at once
    [second] = encoder([PROSE])
    assert len(texts) == 1
    assert first.tolist() == second.tolist() == encoder.tokenizer.encode(PROSE)


def test_texts_of_mostly_new_words_are_the_librarys_own(asked):
    """But for one group in so many, so that words that come again are noticed."""
    texts, encoder = asked
    given_texts = [" ".join(f"{n:x}q" for n in range(20 * i, 20 * i + 20)) for i in range(40)]
    found = [next(encoder([text])).tolist() for text in given_texts]
    every = words._LEARNED_OF_NEW
    expected = [text for i, text in enumerate(given_texts) if i % every]
    assert [text for text in texts if text in given_texts] == expected
    assert found == [encoder.tokenizer.encode(text) for text in given_texts]
    # Most of the words of this one are known or come again.
    texts.clear()
    list(encoder([given_texts[0] + " " + PROSE]))
    assert len(texts) == 1 and PROSE not in texts[0]


def test_sentences_without_spaces_are_not_remembered(encoder):
    text = "\u6cb3\u6c34" * 30
    assert next(encoder([text])).tolist() == encoder.tokenizer.encode(text)
    assert not any(len(word) > 32 for word in [*encoder._words, *encoder._parts])


@pytest.mark.parametrize("crossing", [{"split_by_unicode_script": False}, {"split_digits": False}])
def test_pieces_across_a_place_where_text_is_cut_are_noticed(crossing):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["don't can't won't 1984 1984 1990"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        **{"split_digits": True, "byte_fallback": True, "remove_extra_whitespaces": False}
        | {"normalization_rule_name": "identity", "minloglevel": 2}
        | crossing,
    )
    found = WordEncoder(Tokenizer(model.getvalue()), DTYPE)
    text = "won't 19841990 can'te"
    assert not found.by_words
    assert next(found([text])).tolist() == found.tokenizer.encode(text)


def test_other_tokenizers_are_asked(small_tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer.as_json())
    other = Tokenizer.load(tmp_path)
    encoder = WordEncoder(other, DTYPE)
    assert not encoder.by_words
    assert next(encoder(["the fox\njumps"])).tolist() == other.encode("the fox\njumps")
