"""A sequence's last queries against its paged cache of keys and values."""

import torch
from torch import Tensor

from llama2rt.ops.cuda_kernels.device import Device, positive_scale
from llama2rt.ops.tensors import empty_like, last_contiguous

WIDEST_HEAD = 256
# A tile of 16-bit keys for each warp of a block. What shorter splits would cost in a batch of any
# size is little: there are at most as many as blocks at once, and their results stay in the cache.
SHORTEST_SPLIT = 64
TILE_ROWS = {2: 16, 4: 4}
"""Query rows of a tile, by the bytes of an element."""


def blocks_at_once(dim: int, multiprocessors: int) -> int:
    """Two on a multiprocessor, of heads wider than 128 one: what an A100's shared memory holds."""
    return (2 if dim <= 128 else 1) * multiprocessors


def split_count(items: int, capacity: int, slots: int) -> int:
    """Splits of each context, for `items` = tiles x key heads that may hold `capacity` tokens.

    As many as fit `slots`, the thread blocks that run at once, rounded down: a second wave of
    blocks would cost as much time as the first.
    """
    return max(1, min(slots // items, -(-capacity // SHORTEST_SPLIT)))


def decode_attention(
    on: Device,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], caches [pages, page, Hkv, D], block_table [B, most], lengths [B] -> [T, Hq, D].

    Lengths are below 2^31. ValueError for D above 256. Caches whose rows are not aligned to 16
    bytes are right, but slow.
    """
    tokens, heads, dim = q.shape
    _, page, kv_heads, _ = k_cache.shape
    if dim > WIDEST_HEAD:
        raise ValueError(f"q: expected a head dimension of at most {WIDEST_HEAD}, got {dim}")
    q, scale = positive_scale(q, scale)
    q, k_cache, v_cache, block_table = map(last_contiguous, (q, k_cache, v_cache, block_table))
    lengths = lengths.contiguous()
    out = empty_like(q)
    if q.numel() == 0:
        return out
    if k_cache.numel() == 0 or block_table.numel() == 0:
        return out.zero_()
    slots = blocks_at_once(dim, on.multiprocessors(q))
    tiles = len(block_table)
    if cu_q is not None:  # enough for all, whatever the sequences' numbers of queries
        cu_q = cu_q.contiguous()
        tiles += tokens * (heads // kv_heads) // TILE_ROWS[q.element_size()]
    splits = split_count(tiles * kv_heads, block_table.shape[1] * page, slots)
    partial = lse = None
    if splits > 1:
        partial = q.new_empty(splits, *q.shape, dtype=torch.float32)
        lse = q.new_empty(splits, tokens, heads, dtype=torch.float32)
    cache = k_cache, v_cache, block_table, lengths
    grid = splits, partial, lse, *on.stream(q)
    on.native.decode_attention(q, *cache, scale, cu_q, out, *grid)
    return out
