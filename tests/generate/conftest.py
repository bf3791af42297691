"""A small tokenizer; small models are `small_models`'s."""

import pytest

from llama2rt.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    words = ["a", "small", "assistant", "answers", "questions", "about", "dates", "and", "units"]
    texts = [f"{a} {b} {i * 37 % 101}" for i, a in enumerate(words * 12) for b in words]
    return Tokenizer.train(texts, 330, tmp_path_factory.mktemp("tokenizer"))
