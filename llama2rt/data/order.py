"""A shuffled order of any number of items that is computed, not stored.

A Feistel network (Luby and Rackoff 1988) permutes the numbers of 2h bits, whatever its round
function; cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section
2.2) keeps those below n. An item of the order costs the same at n = 10 and n = 10^12, and no table
of n rows is made. For shuffling, not for secrets.
"""

from collections.abc import Sequence

import numpy as np

# Four make a network look random to whoever sees its outputs (Luby and Rackoff); small halves,
# which have few different outputs a round, want more.
_ROUNDS = 8


class Permutation:
    """A permutation of the numbers below `size` that depends on `key` (numbers from 0) alone. Keys
    that differ in trailing zeros are one key."""

    def __init__(self, size: int, key: Sequence[int]) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        bits = max(1, -(-(size - 1).bit_length() // 2))
        self._size = np.uint64(size)
        self._bits, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        self._keys = round_keys(key, _ROUNDS)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """int64 [k]: what stands at the places `index`, int64 [k], each below `size`."""
        value = self._permuted(index.astype(np.uint64))
        while (outside := np.flatnonzero(value >= self._size)).size:
            value[outside] = self._permuted(value[outside])
        return value.astype(np.int64)

    def _permuted(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> self._bits, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (mixed(right + key) & self._mask)
        return (left << self._bits) | right


def round_keys(key: Sequence[int], count: int) -> np.ndarray:
    """uint64 [count] drawn from `key`."""
    return np.random.SeedSequence(list(key)).generate_state(count, np.uint64)


def mixed(value: np.ndarray) -> np.ndarray:
    """uint64 [k]: each number as a hash of 64 bits (splitmix64's finalizer: Steele, Lea and Flood
    2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
