"""A SentencePiece BPE's ids of long texts, word by word with a memory of words.

Where no piece reaches from one word into the next, a text's ids are those of its words one after
another, and most words of a corpus have come before. What reads words this way is decided by the
model's pieces and settings, once; for every other tokenizer the library is asked as ever.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from llama2rt.text import backends, sentencepiece_model
from llama2rt.text.tokenizer import Tokenizer

# A word with the spaces before it, or a line break with what follows it at once.
_WORD = re.compile(r" +[^ \n]*|\n[^ \n]*")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
MOST_WORDS = 1 << 18
"""remembered at a time: about 50 MB"""


class WordEncoder:
    """`encode(texts)`: the ids that `tokenizer` gives each, as arrays of `dtype`. `by_words` says
    whether words are remembered. Of one thread; can be pickled by its arguments."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.by_words = separable(tokenizer)
        self._words = _Words(tokenizer, dtype)

    def __call__(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            # The library takes the sign itself for a space.
            if not self.by_words or _SPACE in text or not text:
                yield np.array(self.tokenizer.encode(text), self.dtype)
                continue
            backends.require_unicode(text)
            # The library puts a space before a text.
            words = map(self._words.__getitem__, _WORD.findall(" " + text))
            yield np.frombuffer(b"".join(words), self.dtype)
            if len(self._words) > MOST_WORDS:
                self._words.clear()


class _Words(dict[str, bytes]):
    """Ids of words, as bytes of `dtype`."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        super().__init__()
        self._encode, self._dtype = tokenizer.encode, dtype

    def __missing__(self, word: str) -> bytes:
        if word == " ":
            # Of an empty text the library makes nothing, not the space that it puts before others.
            ids = self._encode("\n")[:1]
        elif word.startswith(" "):
            ids = self._encode(word[1:])
        else:
            ids = self._encode(word)[1:]
        found = np.array(ids, self._dtype).tobytes()
        self[word] = found
        return found


def separable(tokenizer: Tokenizer) -> bool:
    """Whether a text's ids are those of its words, one after another: a BPE without normalisation
    that puts a space before a text, none of whose pieces holds a line break, or a space behind
    another character."""
    backend = tokenizer._backend
    if not isinstance(backend, backends.SentencePieceBackend):
        return False
    model = sentencepiece_model.read(backend.definition)
    settings = (
        model.type == "bpe"
        and model.byte_fallback
        and model.add_dummy_prefix
        and model.escape_whitespaces
        and not model.remove_extra_whitespaces
        and not model.whitespace_as_suffix
        and not model.has_normalization_table
    )
    texts = [p.text for p in model.pieces if p.type == sentencepiece_model.NORMAL]
    return (
        settings
        and not model.of_type(sentencepiece_model.USER_DEFINED)
        and not model.of_type(sentencepiece_model.UNUSED)
        and _SPACE in texts
        and not any("\n" in text or _SPACE in text.lstrip(_SPACE) for text in texts)
    )
