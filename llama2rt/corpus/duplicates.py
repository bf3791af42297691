"""Documents of which another, earlier one has the same text, or almost the same.

All chunks are compared with each other without holding them: what two documents have in common when
they are alike (the hash of the text; keys of bands of a MinHash signature, see
`data.near_duplicates`) is written to files by its own value, so that equal ones meet in one, which
is sorted. A candidate counts where the exact Jaccard similarity of both texts says so.

A near-duplicate goes although the earlier one that it is alike may go too: of a chain the first
stays, as Lee et al. 2022 (arXiv 2107.06499) keep one of each connected cluster. Of those that share
a key each is compared with the first and with the 16 before it, so that a phrase that a million
documents have does not make a million times a million pairs.
"""

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from llama2rt.corpus.words import run_hashes, words_of
from llama2rt.data.near_duplicates import PERMUTATIONS, RUN, rows_a_band
from llama2rt.errors import InputError

KEPT, EQUAL, ALIKE, RICH = 0, 1, 2, 3
"""what becomes of a document; RICH: its origin is removed for its personal data"""
_A_FILE = 1 << 19  # rows that are sorted at once
_LATER = 1 << 17  # documents whose candidates are sorted at once
_COMPARED = 16  # of those with the same key, beside the first
_HELD = 512  # texts' runs that are kept for the next comparison


def require_datasketch() -> None:
    """InputError where it is missing."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise InputError(
            "near_duplicates: needs datasketch: pip install 'llama2rt[data]'"
        ) from None


def bands_of(least: float | None) -> int:
    """Bands of a signature; 0 where near-duplicates are not asked for."""
    return 0 if least is None else PERMUTATIONS // rows_a_band(least)


def runs(words: Sequence[str]) -> np.ndarray:
    """uint64 [k], sorted, each once: hashes of a text's runs of three words; of a shorter text all
    its words are one."""
    return np.unique(run_hashes(words, max(1, min(RUN, len(words))))) if words else _NOTHING


_NOTHING = np.zeros(1, np.uint64)
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)


def band_keys(texts: Sequence[Sequence[str]], least: float) -> np.ndarray:
    """uint64 [n, bands] of texts, which are given by their words."""
    from datasketch import MinHash

    rows = rows_a_band(least)
    # Datasketch wants 32 bits.
    hashed = (((found ^ (found >> _HALF)) & _LOW).tolist() for found in map(runs, texts))
    made = MinHash.generator(hashed, num_perm=PERMUTATIONS, seed=1, hashfunc=int)
    signatures = np.stack([one.hashvalues for one in made]).astype(np.uint64)
    bands = signatures[:, : bands_of(least) * rows].reshape(len(texts), -1, rows)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(rows):
        keys = (keys ^ bands[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


class Texts:
    """The runs of any document, read where it lies. `paths` and `offsets`: files of the chunks'
    documents, and of where each begins in them, in order."""

    def __init__(self, paths: Sequence[str], offsets: Sequence[str]) -> None:
        self._paths, self._offsets = paths, offsets
        self._begin = lru_cache(maxsize=16)(self._begins)
        self.runs = lru_cache(maxsize=_HELD)(self._runs)

    def _begins(self, chunk: int) -> np.ndarray:
        with np.load(self._offsets[chunk]) as arrays:
            found: np.ndarray = arrays["offset"]
        return found

    def _runs(self, chunk: int, row: int) -> np.ndarray:
        with open(self._paths[chunk], "rb") as file:
            file.seek(int(self._begin(chunk)[row]))
            return runs(words_of(json.loads(file.readline())["text"]))


class Comparison:
    """Of all documents of a corpus: `fate`, uint8 [n], says what becomes of each, `examples` why of
    the first few. `sizes` are those of its chunks. Files are written below `folder`, and
    removed."""

    def __init__(self, sizes: Sequence[int], folder: Path) -> None:
        self._ends = list(accumulate(sizes))
        self.total = self._ends[-1] if self._ends else 0
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():  # of a run that was killed
            left.unlink()
        self.fate = np.zeros(self.total, np.uint8)
        self.examples: dict[int, list[tuple[int, int, float]]] = {EQUAL: [], ALIKE: []}
        """by fate: (document, the earlier one, their similarity)"""

    def place(self, document: int) -> tuple[int, int]:
        """(chunk, row in it)."""
        chunk = bisect.bisect_right(self._ends, document)
        return chunk, document - (self._ends[chunk - 1] if chunk else 0)

    def first(self, chunk: int) -> int:
        """The number of a chunk's first document."""
        return self._ends[chunk - 1] if chunk else 0

    def equal(self, digests: Iterator[np.ndarray]) -> None:
        """Mark all but the first of each text. `digests`: uint64 [n, 2] of each chunk."""
        fate, examples = self.fate, self.examples[EQUAL]
        for rows in self._by_value("equal", digests):
            rows = rows[fate[rows[:, 2].astype(np.int64)] == KEPT]
            rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
            same = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
            again = np.flatnonzero(same) + 1
            fate[rows[again, 2].astype(np.int64)] = EQUAL
            # The first of each group, for the examples.
            first = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(rows)), 0))
            for at in again[np.argsort(rows[again, 2])][:3].tolist():
                examples.append((int(rows[at, 2]), int(rows[first[at], 2]), 1.0))

    def alike(self, bands: Sequence[Iterable[np.ndarray]], texts: Texts, least: float) -> None:
        """Mark those that are alike an earlier one. `bands`: of each band, uint64 [n] of each
        chunk."""
        for band in bands:
            for rows in self._by_value("band", (np.c_[keys, keys] for keys in band)):
                self._write_candidates(rows)
        fate, examples = self.fate, self.examples[ALIKE]
        for path in sorted(self._folder.glob("later-*")):
            pairs = np.unique(np.fromfile(path, np.int64).reshape(-1, 2), axis=0)
            path.unlink()
            for later, earlier in pairs.tolist():
                if fate[later] != KEPT:
                    continue
                mine, theirs = texts.runs(*self.place(later)), texts.runs(*self.place(earlier))
                if (similarity := jaccard(mine, theirs, least)) >= least:
                    fate[later] = ALIKE
                    if len(examples) < 3:
                        examples.append((later, earlier, similarity))

    def _write_candidates(self, rows: np.ndarray) -> None:
        """(later, earlier) of the documents with equal values, by the later one's number."""
        rows = rows[self.fate[rows[:, 2].astype(np.int64)] == KEPT]
        rows = rows[np.lexsort((rows[:, 2], rows[:, 0]))]
        same = np.r_[False, rows[1:, 0] == rows[:-1, 0]]
        first = np.maximum.accumulate(np.where(~same, np.arange(len(rows)), 0))
        again = np.flatnonzero(same)
        number = rows[:, 2].astype(np.int64)
        found = [np.c_[number[again], number[first[again]]]]
        for back in range(1, _COMPARED + 1):
            later = again[again - back > first[again]]
            found.append(np.c_[number[later], number[later - back]])
        pairs = np.concatenate(found)
        for group in np.unique(pairs[:, 0] // _LATER).tolist():
            with open(self._folder / f"later-{group:08}", "ab") as file:
                np.unique(pairs[pairs[:, 0] // _LATER == group], axis=0).tofile(file)

    def _by_value(self, name: str, values: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """uint64 [k, 3] of (two values, document): all documents, in parts that hold all of equal
        values. `values`: uint64 [n, 2] of each chunk."""
        parts = 1 << (self.total // _A_FILE).bit_length()
        for chunk, found in enumerate(values):
            number = np.arange(self.first(chunk), self.first(chunk) + len(found), dtype=np.uint64)
            rows = np.c_[found, number]
            part = rows[:, 0] % np.uint64(parts)
            for index in np.unique(part).tolist():
                with open(self._folder / f"{name}-{index:08}", "ab") as file:
                    rows[part == index].tofile(file)
        for path in sorted(self._folder.glob(f"{name}-*")):
            rows = np.fromfile(path, np.uint64).reshape(-1, 3)
            path.unlink()
            yield rows


def jaccard(one: np.ndarray, other: np.ndarray, least: float) -> float:
    """Similarity of two sets, each sorted; 0 where their sizes alone rule out `least`."""
    small, large = sorted((len(one), len(other)))
    if small == 1 and one[0] == other[0] == 0:  # neither has a word to compare
        return 0.0
    if small < least * large:
        return 0.0
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (small + large - common)
