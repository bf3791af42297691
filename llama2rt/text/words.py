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
_TOGETHER = 1 << 14  # characters of texts that are read at once
# To learn a word takes up to four times as long as the library takes for it, in vain where it never
# comes again. Of groups with mostly new words (random names, log lines) one in so many is learned,
# beginning with the first: where words do come again, the next groups have fewer new ones.
_LEARNED_OF_NEW = 16
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
        self._mostly_new = 0
        """groups so far most of whose words were new"""
        # Behind the space that the library puts before a text.
        self._line_break = self._encode("\n")[1:] if self.by_words else np.empty(0, dtype)

    def __call__(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        group: list[str] = []
        size = 0
        for text in texts:
            group.append(text)
            size += len(text)
            if size >= _TOGETHER:
                yield from self._encode_group(group)
                group, size = [], 0
        yield from self._encode_group(group)

    def _encode_group(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts whose new words the library is asked for at once."""
        found: list[bytes] = []
        lacking: dict[int, list[str]] = {}
        ids_of = self._words.__getitem__
        for index, text in enumerate(texts):
            backends.require_unicode(text)
            # The library takes the sign itself for a space.
            if not self.by_words or _SPACE in text or not text:
                found.append(self._encode(text).tobytes())
                continue
            words = _words_of(text)
            try:
                found.append(b"".join(map(ids_of, words)))
            except KeyError:
                found.append(b"")
                lacking[index] = words
        if lacking:
            new = set().union(*lacking.values()).difference(self._words)
            if 2 * len(new) > sum(map(len, lacking.values())):
                self._mostly_new += 1
                if self._mostly_new % _LEARNED_OF_NEW != 1:
                    for index in lacking:
                        found[index] = self._encode(texts[index]).tobytes()
                    return [np.frombuffer(ids, self.dtype) for ids in found]
            parts = self._learn(new)
            for index, words in lacking.items():
                found[index] = b"".join(map(ids_of, words))
            self._forget(new, parts)
        return [np.frombuffer(ids, self.dtype) for ids in found]

    def _learn(self, words: set[str]) -> set[str]:
        """Take up ids of words; returns those of their parts that were not known either."""
        divided = {w: _PART.findall(w if w.startswith("\n") else " " + w) for w in words}
        parts = set().union(*divided.values()).difference(self._parts)
        self._parts.update(self._asked(list(parts)))
        ids_of = self._parts.__getitem__
        self._words.update((w, b"".join(map(ids_of, found))) for w, found in divided.items())
        return parts

    def _forget(self, words: set[str], parts: set[str]) -> None:
        """Of what was learned last, what is too long; all, where it is too much."""
        for memory, new in ((self._words, words), (self._parts, parts)):
            if len(memory) > MOST_WORDS:
                memory.clear()
            for long in (one for one in new if len(one) > _LONGEST):
                memory.pop(long, None)

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
