"""Paged key/value cache: which page belongs to whom, the pages themselves, attention over them.

Pages are counted on the host (numpy) and stored on the model's device, `[pages, page, Hkv, D]` per
layer. Samples of one prompt share its full pages by reference count; a shared page is full, so it
is never written again. Swapping pages to host memory and reuse between calls are left out.
"""

from collections.abc import Sequence
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
    """Free list and reference counts of `pages` pages."""

    def __init__(self, pages: int) -> None:
        self._stack = np.arange(pages, dtype=np.int32)[::-1].copy()
        self._references = np.zeros(pages, dtype=np.int32)
        self.free = pages

    def take(self, count: int) -> np.ndarray:
        """int32 [count] pages, one reference each; the caller has checked `free`."""
        assert count <= self.free, f"{count} pages taken, {self.free} free"
        self.free -= count
        pages = self._stack[self.free : self.free + count].copy()
        self._references[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """One more reference to each of these distinct pages."""
        self._references[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """One reference less to each of these distinct pages; the last one frees the page."""
        self._references[pages] -= 1
        unused = pages[self._references[pages] == 0]
        self._stack[self.free : self.free + len(unused)] = unused
        self.free += len(unused)


PAGE_SIZE = 16
"""tokens"""


def sequence_bytes(config: LlamaConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the cache that one sequence of `tokens` fills, before there is a model: in pages of
    the usual size, as `page_bytes` counts them."""
    width = 2 * config.layers * config.kv_heads * config.head_dim
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE * width * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where one forward pass writes and reads: first packed prompts, then one token a sequence.

    T = prompt tokens + B. `slots` int64 [T] is page * page_size + offset of every token;
    `prompt_cu_seqlens` int32 [prompts + 1]; `block_table` int32 [B, W] and `lengths` int32 [B]
    (the new token included) are the decoding sequences'.
    """

    slots: Tensor
    prompt_cu_seqlens: Tensor
    prompt_tokens: int
    longest_prompt: int
    block_table: Tensor
    lengths: Tensor


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
            return ops.decode_attention(q, keys, values, at.block_table, at.lengths)
        prompts = ops.attention(
            q[:n], k[:n], v[:n], at.prompt_cu_seqlens, max_seqlen=at.longest_prompt
        )
        if n == len(q):
            return prompts
        decoded = ops.decode_attention(q[n:], keys, values, at.block_table, at.lengths)
        return torch.cat([prompts, decoded])

    def allocate(self, heads: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of all layers; `heads` (Hkv, D) and `like`, of the model's dtype and
        device, are the first call's to say."""
        if self.keys is None or self.values is None:
            shape = (self.layers, self.pages, self.page_size, *heads)
            self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        return self.keys, self.values

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies whole pages (int64 [n] each) in all layers."""
        if self.keys is None or self.values is None:
            return
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
