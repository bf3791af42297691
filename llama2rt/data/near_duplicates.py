"""Texts that are almost the same as an earlier one, by MinHash (Broder 1997) and bands of it
(Leskovec, Rajaraman and Ullman: Mining of Massive Datasets, chapter 3).

Signatures only propose: a pair counts where the exact Jaccard similarity says so, of every part on
its own, so that two comparisons of one long prompt are not taken for one. They are of the last
question and the answers: a system message that all records share would propose every pair. They are
datasketch's; the index is ours, since `MinHashLSH` holds a Python set for every band of every
record, and a signature is 512 bytes.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from llama2rt.errors import InputError

PERMUTATIONS = 128
RUN = 3
"""words; answers of a sentence have some, and a changed word changes no more than three"""
_RECALL = 0.995
"""share of the pairs at the threshold itself that bands must propose, if not more"""
# Scripts without spaces have a word a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

Parts = Sequence[str]


def earlier_alike(texts: Sequence[Parts], least: float) -> Iterator[tuple[int, int, float]]:
    """(index, index of an earlier one, similarity of the part that is least alike) for each of
    `texts`, which have as many parts each, that is alike one before it by at least `least` in every
    part, those aside that are left out so themselves. A pair at `least` exactly is found with a
    probability of 0.995, one further above with more. Of several parts the first is what was said
    before. InputError where datasketch is missing."""
    signatures, sizes = _signatures(texts)
    near = _Neighbours(signatures, least)
    for index, text in enumerate(texts):
        for earlier in _of_like_size(sizes, index, near.of(index), least):
            if (similarity := _similarity(text, texts[earlier], least)) >= least:
                yield index, earlier, similarity
                break
        else:
            near.add(index)


@lru_cache(maxsize=4096)  # candidates come again and again
def runs(text: str) -> frozenset[str]:
    """The runs of three words of a text, without case and punctuation; of a shorter one all its
    words as one, and of one without words the text."""
    words = WORD.findall(text.casefold())
    if len(words) <= RUN:
        return frozenset([" ".join(words) or text.strip()])
    return frozenset(" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1))


def _of_like_size(sizes: np.ndarray, index: int, candidates: list[int], least: float) -> list[int]:
    """Those `candidates` whose parts have not so many more or fewer runs that they must differ."""
    if not candidates:
        return []
    own, others = sizes[index], sizes[candidates]
    like = np.minimum(own, others) >= least * np.maximum(own, others)
    return [c for c, alike in zip(candidates, like.all(axis=1).tolist(), strict=True) if alike]


def _similarity(one: Parts, other: Parts, least: float) -> float:
    """The least similarity of the parts, or that of the first that is below `least`."""
    lowest = 1.0
    for mine, theirs in zip(map(runs, one), map(runs, other), strict=True):
        common = len(mine & theirs)
        lowest = min(lowest, common / (len(mine) + len(theirs) - common))
        if lowest < least:
            break
    return lowest


def _signatures(texts: Sequence[Parts]) -> tuple[np.ndarray, np.ndarray]:
    """(signatures uint32 [n, permutations], runs of each part int32 [n, parts]). The runs of
    different parts count apart: the similarity of the whole is then at least that of the part that
    is least alike."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise InputError(
            "filters.near_duplicates: needs datasketch: pip install 'llama2rt[data]'"
        ) from None
    found = np.empty((len(texts), PERMUTATIONS), np.uint32)
    sizes = np.empty((len(texts), len(texts[0]) if texts else 0), np.int32)

    def hashed() -> Iterator[list[int]]:
        for row, text in zip(sizes, texts, strict=True):
            every = [runs(part) for part in text]
            row[:] = [len(part) for part in every]
            asked = every[1:] or every
            yield [zlib.crc32(f"{i} {run}".encode()) for i, p in enumerate(asked) for run in p]

    made = MinHash.generator(hashed(), num_perm=PERMUTATIONS, seed=1, hashfunc=int)
    for row, signature in zip(found, made, strict=True):
        row[:] = signature.hashvalues
    return found, sizes


class _Neighbours:
    """Which earlier texts share a band of the signature with one; only those that were added."""

    def __init__(self, signatures: np.ndarray, least: float) -> None:
        rows = rows_a_band(least)
        self._groups: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        """by index: (band, number of those with the same values in it), where there is another"""
        self._added: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for band in range(PERMUTATIONS // rows if len(signatures) else 0):
            values = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
            whole = values.view(np.dtype((np.void, values.itemsize * rows))).ravel()
            _, group, size = np.unique(whole, return_inverse=True, return_counts=True)
            for index in np.flatnonzero(size[group] > 1).tolist():
                self._groups[index].append((band, int(group[index])))

    def of(self, index: int) -> list[int]:
        """The earlier ones, in order."""
        return sorted({i for group in self._groups.get(index, ()) for i in self._added[group]})

    def add(self, index: int) -> None:
        for group in self._groups.get(index, ()):
            self._added[group].append(index)


def rows_a_band(least: float) -> int:
    """The most values a band that still propose a pair of similarity `least` with `_RECALL`:
    1 - (1 - s^r)^b."""
    for rows in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - least**rows) ** (PERMUTATIONS // rows) >= _RECALL:
            return rows
    return 1
