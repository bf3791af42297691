"""Words of a text, and hashes of its runs of words: what several steps compare documents by."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from llama2rt.data.near_duplicates import WORD

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses bits


def words_of(text: str) -> list[str]:
    """Its words, in lower case and without punctuation."""
    return WORD.findall(text.casefold())


@lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    data = word.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def run_hashes(words: Sequence[str], n: int) -> np.ndarray:
    """uint64 [len(words) - n + 1]: of each run of `n` words a polynomial of their hashes, modulo
    2^64."""
    values = np.fromiter(map(_hash, words), np.uint64, len(words))
    count = len(words) - n + 1
    found = np.zeros(count, np.uint64)
    for at in range(n):
        found = found * _BASE + values[at : at + count]
    return found
