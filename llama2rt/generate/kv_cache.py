"""Paged key/value cache: which page belongs to whom, the pages themselves, attention over them.

Pages are counted on the host (numpy) and stored on the model's device, `[pages, page, Hkv, D]` per
layer. Sequences that begin alike share full pages by reference count; a shared page is full, so it
is never written again. Swapping pages to host memory is left out.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from llama2rt import ops
from llama2rt.model.config import LlamaConfig
from llama2rt.model.llama import Llama
from llama2rt.model.transformer import Block


class PagePool:
    """Free list and reference counts of `pages` pages.

    A page that is `kept` when its last reference goes is free too, but taken only when there is no
    other, the least recently used first; `forget` is told of it. Until then `share` brings it back.
    """

    def __init__(self, pages: int, forget: Callable[[int], None] | None = None) -> None:
        self.pages = pages
        self._stack = np.arange(pages, dtype=np.int32)[::-1].copy()
        self._empty = pages  # of the stack
        self._references = np.zeros(pages, dtype=np.int32)
        self._kept = np.zeros(pages, dtype=bool)
        self._unused: OrderedDict[int, None] = OrderedDict()  # kept, without references
        self._forget = forget

    @property
    def free(self) -> int:
        return self._empty + len(self._unused)

    @property
    def cached(self) -> int:
        """Free pages that are kept."""
        return len(self._unused)

    def take(self, count: int) -> np.ndarray:
        """int32 [count] pages, one reference each; the caller has checked `free`."""
        assert count <= self.free, f"{count} pages taken, {self.free} free"
        for _ in range(count - self._empty):
            page, _ = self._unused.popitem(last=False)
            self._drop(page)
        self._empty -= count
        pages = self._stack[self._empty : self._empty + count].copy()
        self._references[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """One more reference to each of these distinct pages, which are held or kept."""
        for page in pages[self._references[pages] == 0].tolist():
            del self._unused[page]
        self._references[pages] += 1

    def unreferenced(self, pages: np.ndarray) -> int:
        """How many of these pages are free: kept, and held by nobody."""
        return int((self._references[pages] == 0).sum())

    def release(self, pages: np.ndarray) -> None:
        """One reference less to each of these distinct pages; the last one frees the page."""
        self._references[pages] -= 1
        unused = pages[self._references[pages] == 0]
        kept = self._kept[unused]
        empty = unused[~kept]
        self._stack[self._empty : self._empty + len(empty)] = empty
        self._empty += len(empty)
        # The last first: a page without the ones before it is found by nobody.
        for page in unused[kept][::-1].tolist():
            self._unused[page] = None

    def keep(self, page: int) -> None:
        """From now on this page, which is held, is kept."""
        self._kept[page] = True

    def drop_kept(self) -> None:
        """No page is kept any more; `forget` is told of none."""
        empty = np.fromiter(self._unused, np.int32, len(self._unused))
        self._stack[self._empty : self._empty + len(empty)] = empty
        self._empty += len(empty)
        self._unused.clear()
        self._kept[:] = False

    def _drop(self, page: int) -> None:
        self._kept[page] = False
        self._stack[self._empty] = page
        self._empty += 1
        if self._forget is not None:
            self._forget(page)


PAGE_SIZE = 16
"""tokens"""


def sequence_bytes(config: LlamaConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the cache that one sequence of `tokens` fills, before there is a model: in pages of
    the usual size, as `page_bytes` counts them."""
    width = 2 * config.layers * config.kv_heads * config.head_dim
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE * width * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where one forward pass writes and reads: first whole prompts, packed, then the new tokens of
    sequences that have a past in the cache.

    T = prompt tokens + the others. `slots` int64 [T] is page * page_size + offset of every token;
    `prompt_cu_seqlens` int32 [prompts + 1]; `block_table` int32 [B, W] and `lengths` int32 [B] (the
    new tokens included) are the others'; `cu_seqlens_q` int32 [B + 1] are the offsets of their new
    tokens, None where each has one.
    """

    slots: Tensor
    prompt_cu_seqlens: Tensor
    prompt_tokens: int
    longest_prompt: int
    block_table: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor | None


def page_bytes(model: Llama, page_size: int) -> int:
    """Bytes of one page of `page_size` tokens: keys and values of all layers, in the weights'
    dtype."""
    blocks = model.transformer.blocks
    weight = cast(Block, blocks[0]).key.weight
    return 2 * len(blocks) * page_size * weight.shape[0] * weight.element_size()


class KVCache:
    """Keys and values of all layers: the `Attention` of a forward pass that generates."""

    def __init__(self, layers: int, pages: int, page_size: int) -> None:
        self.layers, self.pages, self.page_size = layers, pages, page_size
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.addresses: Addresses | None = None
        self._logits: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v [T, Hkv, D] (after rope), returns attention [T, Hq, D] of q [T, Hq, D].

        The first call allocates, so that head counts, dtype and device are those of the model as
        it runs (sharded or not) and not of its configuration.
        """
        all_keys, all_values = self.allocate(k.shape[1:], k)
        at = self.addresses
        assert at is not None, "addresses are set before each forward pass"
        keys, values = all_keys[layer], all_values[layer]
        keys.view(-1, *k.shape[1:]).index_copy_(0, at.slots, k)
        values.view(-1, *v.shape[1:]).index_copy_(0, at.slots, v)
        n = at.prompt_tokens
        if n == 0:
            return self._paged(q, keys, values, at)
        prompts = ops.attention(
            q[:n], k[:n], v[:n], at.prompt_cu_seqlens, max_seqlen=at.longest_prompt
        )
        if n == len(q):
            return prompts
        return torch.cat([prompts, self._paged(q[n:], keys, values, at)])

    def allocate(self, heads: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of all layers; `heads` (Hkv, D) and `like`, of the model's dtype and
        device, are the first call's to say."""
        if self.keys is None or self.values is None:
            shape = (self.layers, self.pages, self.page_size, *heads)
            self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        return self.keys, self.values

    def logits(self, rows: int, vocabulary: int) -> Tensor:
        """fp32 [rows, vocabulary] with any values, in the same memory at each pass."""
        if self._logits is None or len(self._logits) < rows:
            self._logits = torch.empty(rows, vocabulary)
        return self._logits[:rows]

    @staticmethod
    def _paged(q: Tensor, keys: Tensor, values: Tensor, at: Addresses) -> Tensor:
        if at.cu_seqlens_q is None:
            return ops.decode_attention(q, keys, values, at.block_table, at.lengths)
        return ops.decode_attention(
            q, keys, values, at.block_table, at.lengths, cu_seqlens_q=at.cu_seqlens_q
        )

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies whole pages (int64 [n] each) in all layers."""
        if self.keys is None or self.values is None:
            return
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
