"""Which tokens of evaluation samples stand in training texts, up to a few that differ.

Llama 2, appendix A.6: a token is contaminated where it lies in a span of at least L tokens that
the sample and a training text share. A span begins with ten equal tokens, may then differ in at
most four, and ends with an equal one. The paper finds spans with suffix arrays of the training
data, on a cluster; here the evaluation set is what is indexed, because it is small, and training
texts go past it once, so that memory does not grow with them.
"""

from collections.abc import Sequence

import numpy as np

SEED = 10
"""equal tokens with which a span begins: appendix A.6, no mismatches in the first ten"""
SKIPS = 4
"""tokens that may differ in a span: appendix A.6, a skipgram budget of four"""
LENGTHS = (10, 20, 30, 40, 50)
"""least lengths of spans that are tried: appendix A.6"""

_PAIRS_AT_ONCE = 1 << 18  # of a text's and the samples' positions that are compared: about 20 MiB
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that products modulo 2^64 lose nothing


class Overlap:
    """Spans that evaluation `samples`, token ids [n] each, share with texts given to `add`.

    The work for a text grows with its length and with the places of both where ten tokens are
    equal; memory with the samples and one text.
    """

    def __init__(self, samples: Sequence[Sequence[int] | np.ndarray], skips: int = SKIPS) -> None:
        if skips < 0:
            raise ValueError(f"skips must be at least 0, got {skips}")
        self.skips = skips
        self.lengths = np.array([len(sample) for sample in samples], np.int64)
        self._tokens = np.concatenate(
            [np.zeros(0, np.int32), *(np.asarray(sample, np.int32) for sample in samples)]
        )
        self._owner = np.repeat(np.arange(len(samples)), self.lengths)
        ends = np.cumsum(self.lengths)
        self._ends = ends[self._owner]
        self._begins = (ends - self.lengths)[self._owner]
        starts = np.flatnonzero(np.arange(len(self._tokens)) + SEED <= self._ends)
        # Ten tokens that reach into the next sample are hashed as well, and dropped here.
        hashes = _hashes(self._tokens)[starts]
        order = np.argsort(hashes, kind="stable")
        self._positions = starts[order]
        self._known, first = np.unique(hashes[order], return_index=True)
        self._groups = np.append(first, len(order))
        self._reach = np.zeros(len(self._tokens), np.int32)  # longest span from each token on

    def add(self, text: Sequence[int] | np.ndarray) -> None:
        """Looks for the samples' spans in the token ids of a training text."""
        tokens = np.asarray(text, np.int32)
        hashes = _hashes(tokens)
        if not len(hashes) or not len(self._known):
            return
        group = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
        places = np.flatnonzero(self._known[group] == hashes)
        group = group[places]
        counts = self._groups[group + 1] - self._groups[group]
        for part in _parts(counts):
            of_text = np.repeat(places[part], counts[part])
            first = np.repeat(self._groups[group[part]], counts[part])
            within = np.arange(len(first)) - np.repeat(
                np.cumsum(counts[part]) - counts[part], counts[part]
            )
            self._compare(tokens, of_text, self._positions[first + within])

    def shares(self, length: int) -> np.ndarray:
        """Share fp64 [samples] of each sample's tokens that lie in a span of at least `length`
        tokens; 0 of an empty sample. ValueError below `SEED`, from which on spans are known."""
        if length < SEED:
            raise ValueError(f"length must be at least {SEED}, got {length}")
        starts = np.flatnonzero(self._reach >= length)
        change = np.zeros(len(self._tokens) + 1, np.int64)
        np.add.at(change, starts, 1)
        np.add.at(change, starts + self._reach[starts], -1)
        covered = np.bincount(
            self._owner, weights=np.cumsum(change[:-1]) > 0, minlength=len(self.lengths)
        )
        return covered / np.maximum(self.lengths, 1)

    def _compare(self, text: np.ndarray, of_text: np.ndarray, of_sample: np.ndarray) -> None:
        """Extends pairs of positions with equal hashes to spans."""
        # Where the tokens before are equal too, the span from there holds this one: it meets the
        # same differences.
        inner = (of_text > 0) & (of_sample > self._begins[of_sample])
        inner[inner] = text[of_text[inner] - 1] == self._tokens[of_sample[inner] - 1]
        of_text, of_sample = of_text[~inner], of_sample[~inner]
        seed = np.arange(SEED)
        equal = text[of_text[:, None] + seed] == self._tokens[of_sample[:, None] + seed]
        real = equal.all(axis=1)
        of_text, of_sample = of_text[real], of_sample[real]
        differing = np.zeros(len(of_text), np.int64)
        length, step = np.full(len(of_text), SEED), SEED
        at_text, at_sample = of_text, of_sample
        while len(at_text):
            np.maximum.at(self._reach, at_sample, length)
            inside = (at_text + step < len(text)) & (at_sample + step < self._ends[at_sample])
            at_text, at_sample = at_text[inside], at_sample[inside]
            differing, length = differing[inside], length[inside]
            same = text[at_text + step] == self._tokens[at_sample + step]
            step += 1
            length = np.where(same, step, length)  # a span ends with an equal token
            differing = differing + ~same
            going = differing <= self.skips
            at_text, at_sample = at_text[going], at_sample[going]
            differing, length = differing[going], length[going]


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 [max(0, n - 9)]: of each ten tokens in a row."""
    count = max(0, len(tokens) - SEED + 1)
    found = np.zeros(count, np.uint64)
    for i in range(SEED if count else 0):
        found = found * _MULTIPLIER + tokens[i : i + count].astype(np.uint64)
    return found


def _parts(counts: np.ndarray) -> list[slice]:
    """Consecutive parts whose `counts` add up to few enough to compare at once, or are one."""
    parts: list[slice] = []
    begin = total = 0
    for i, count in enumerate(counts.tolist()):
        if total + count > _PAIRS_AT_ONCE and i > begin:
            parts.append(slice(begin, i))
            begin, total = i, 0
        total += count
    return [*parts, slice(begin, len(counts))] if len(counts) else parts
