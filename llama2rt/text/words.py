"""A SentencePiece BPE's ids of long texts, word by word with a memory of words.

Merges make pieces of the vocabulary and nothing else, so that where two characters follow each
other in no piece, no merge ever reaches from one to the other: a text's ids are those of its parts
between such places, one after another. LLaMA's pieces, whose trainer split text at spaces, at
digits and between scripts, have such places on both sides of each word, and most words of a corpus
have come before. What reads words this way is decided by the model's pieces and settings, once;
for every other tokenizer the library is asked as ever.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama2rt.text import backends, sentencepiece_model
from llama2rt.text.tokenizer import Tokenizer

# Texts are read in two steps, as most words have come before with the marks beside them: words with
# the spaces before them, or lines' first words with the line break; and of those not known parts.
_WORD = re.compile(r" +[^ \n]*|\n[^ \n]*")
_MARK = r"[^A-Za-z0-9 \n\x80-\U0010ffff]"
_ALONE = r"(?![\x80-\U0010ffff])"  # letters and marks beyond ASCII are not told apart
# Letters, a few digits, marks, or what goes on to the next space, line break or digit: each with
# the spaces before it. Spaces before a line break; a line break.
_PART = re.compile(rf" *+(?:[A-Za-z]++{_ALONE}|[0-9]{{1,3}}+|{_MARK}++{_ALONE}|[^ \n0-9]++)| ++|\n")
# Kinds of characters (`_kind`) that follow each other somewhere inside a part.
_INSIDE = {"LL", "LU", "UL", "UU", "UP", "PU", "PP", "SS", "SL", "SU", "SP", "SD"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
MOST_WORDS = 1 << 18
"""remembered at a time, and as many parts"""
_LONGEST = 32  # characters of what is remembered: in scripts without spaces a sentence is a word


class WordEncoder:
    """`encode(texts)`: the ids that `tokenizer` gives each, as arrays of `dtype`. `by_words` says
    whether words are remembered. Of one thread; can be pickled by its arguments."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.by_words = separable(tokenizer)
        # Ids as bytes of `dtype`. A word that begins with a line break stands for itself, any other
        # has a space before it that is not written.
        self._words: dict[str, bytes] = {}
        self._parts: dict[str, bytes] = {}
        # Behind the space that the library puts before a text.
        self._line_break = self._encode("\n")[1:] if self.by_words else np.empty(0, dtype)

    def __call__(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            # The library takes the sign itself for a space.
            if not self.by_words or _SPACE in text or not text:
                yield self._encode(text)
                continue
            backends.require_unicode(text)
            words = _words_of(text)
            found: list[Any] = list(map(self._words.get, words))
            if None in found:
                pairs = list(zip(words, found, strict=True))
                new = self._learned({word for word, ids in pairs if ids is None})
                found = [new[word] if ids is None else ids for word, ids in pairs]
            yield np.frombuffer(b"".join(found), self.dtype)

    def _learned(self, words: set[str]) -> dict[str, bytes]:
        """Ids of words that are not remembered, and will be."""
        divided = {w: _PART.findall(w if w.startswith("\n") else " " + w) for w in words}
        known = self._parts
        unknown = {part for parts in divided.values() for part in parts if part not in known}
        known.update(self._asked(list(unknown)))
        new = {w: b"".join(map(known.__getitem__, parts)) for w, parts in divided.items()}
        self._words.update((w, ids) for w, ids in new.items() if len(w) <= _LONGEST)
        for part in unknown:
            if len(part) > _LONGEST:
                del known[part]
        for memory in (self._words, known):
            if len(memory) > MOST_WORDS:
                memory.clear()
        return new

    def _asked(self, parts: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """(part, its ids) of each. The library is asked once for all, with a line break before and
        behind each part; one that is a line break stands between two with nothing between them."""
        ids = self._encode("\n".join(["", *("" if p == "\n" else p for p in parts), ""]))
        breaks = np.flatnonzero(ids == self._line_break).tolist()
        data, size = ids.tobytes(), self.dtype.itemsize
        for part, (begin, end) in zip(parts, itertools.pairwise(breaks), strict=True):
            # Of a line break its own id.
            yield part, data[(begin + (part != "\n")) * size : end * size]

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text), self.dtype)


def _words_of(text: str) -> list[str]:
    """As `WordEncoder._words` has them, in order."""
    if text.startswith(" ") or "  " in text:
        # The library puts a space before a text.
        return [w[1:] if w.startswith(" ") else w for w in _WORD.findall(" " + text)]
    return text.replace("\n", " \n").split(" ")


def separable(tokenizer: Tokenizer) -> bool:
    """Whether a text's ids are those of its words, one after another: a BPE without normalisation
    that puts a space before a text, in none of whose pieces two characters follow each other
    between which a text is cut into words."""
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
        and not any("\n" in text for text in texts)
        and {a + b for t in texts for a, b in itertools.pairwise(map(_kind, t))} <= _INSIDE
    )


def _kind(character: str) -> str:
    """Space, Digit, Letter or Punctuation of ASCII; Unicode beyond."""
    if character == _SPACE:
        return "S"
    if not character.isascii():
        return "U"
    return "L" if character.isalpha() else "D" if character.isdigit() else "P"
