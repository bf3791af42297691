"""Which full pages hold which tokens, so that a prompt that begins like an earlier one finds them.

A page's keys and values depend on its tokens and on all before them. So a page is known by a digest
of its tokens and of the page in front of it (Kwon et al. 2023, section 4.4; the chain of digests is
vLLM's and SGLang's radix tree flattened). A page is known from the step on that computes it: each
layer stores all new keys and values before any query of that step reads them.
"""

import hashlib

import numpy as np

from llama2rt.generate.kv_cache import PagePool

# Fewer tokens are computed faster than found: a query with a past takes the paged kernel, which
# prompts otherwise pass by.
LEAST_TOKENS = 64


class PrefixCache:
    """The pages of `pool`, of `page_size` tokens, by what they hold; says which are kept."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pool = PagePool(pages, self._forget)
        self._page_size = page_size
        self._pages: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self.hits = 0
        """tokens found"""

    def chain(self, tokens: np.ndarray) -> list[bytes]:
        """Digests of the full pages of int32 `tokens`."""
        digests, before = [], b""
        size = self._page_size
        for begin in range(0, len(tokens) // size * size, size):
            page = tokens[begin : begin + size].tobytes()
            before = hashlib.blake2b(before + page, digest_size=16).digest()
            digests.append(before)
        return digests

    def find(self, chain: list[bytes]) -> np.ndarray:
        """int32 pages that hold the longest known beginning; none where it is short. They are not
        yet shared."""
        pages = []
        for digest in chain:
            page = self._pages.get(digest)
            if page is None:
                break
            pages.append(page)
        if len(pages) * self._page_size < LEAST_TOKENS:
            pages = []
        return np.array(pages, np.int32)

    def add(self, chain: list[bytes], pages: np.ndarray) -> None:
        """`pages`, which are held, hold the tokens of `chain`, as far as both go."""
        for digest, page in zip(chain, pages.tolist(), strict=False):
            if digest not in self._pages and page not in self._digests:
                self._pages[digest], self._digests[page] = page, digest
                self.pool.keep(page)

    def clear(self) -> None:
        """No page is known any more: the weights have changed."""
        self._pages.clear()
        self._digests.clear()
        self.pool.drop_kept()

    def _forget(self, page: int) -> None:
        del self._pages[self._digests.pop(page)]
