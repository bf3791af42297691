"""Texts of evaluation sets inside documents, by runs of words (Brown et al. 2020, appendix C).

Words are compared without case and punctuation. A document's runs are hashed in numpy, all at once;
what has the hash of an evaluation set's run is compared word by word.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama2rt.corpus.words import run_hashes, words_of
from llama2rt.data.files import rows
from llama2rt.errors import InputError

LEAST_WORDS = 8
"""of a text that is shorter than a run: Brown et al. take 8 as the least"""


class Match(NamedTuple):
    """Where a document has words of an evaluation set."""

    where: str
    """FILE:LINE of the set"""
    words: str


class EvaluationSets:
    """The runs of `ngram` words of all texts in `paths`; of a text with fewer, but at least 8, all
    its words. `short` counts texts with fewer still, which are not looked for. InputError for a
    file that cannot be read, and where no text is long enough."""

    def __init__(self, paths: Sequence[Path], ngram: int) -> None:
        self.short = 0
        self._runs: dict[int, dict[int, tuple[tuple[str, ...], str]]] = {}
        for path in paths:
            before = sum(map(len, self._runs.values()))
            for where, text in texts_of(path):
                self._add(words_of(text), ngram, where)
            if sum(map(len, self._runs.values())) == before:
                raise InputError(f"evaluation: {path}: no text of {LEAST_WORDS} words that is new")
        self._sorted = {n: np.sort(np.fromiter(runs, np.uint64)) for n, runs in self._runs.items()}

    def _add(self, words: list[str], ngram: int, where: str) -> None:
        if len(words) < LEAST_WORDS:
            self.short += 1
            return
        n = min(ngram, len(words))
        found = self._runs.setdefault(n, {})
        for at, key in enumerate(run_hashes(words, n).tolist()):
            found.setdefault(key, (tuple(words[at : at + n]), where))

    def find(self, words: Sequence[str]) -> Match | None:
        """The first run that a document of these `words` has in common with a set."""
        for n, known in self._sorted.items():
            if len(words) < n:
                continue
            hashes = run_hashes(words, n)
            place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
            for at in np.flatnonzero(known[place] == hashes).tolist():
                run, where = self._runs[n][int(hashes[at])]
                if tuple(words[at : at + n]) == run:
                    return Match(where, " ".join(run))
        return None


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, text) of every text anywhere in the rows of a file, whatever their format: texts
    of less than `LEAST_WORDS` words, such as roles and labels, too."""
    for line, row in rows(path, "document", None):
        if isinstance(row, InputError):
            raise InputError(f"{path}:{line}: {row}")
        yield from ((f"{path}:{line}", text) for text in _texts(row))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
