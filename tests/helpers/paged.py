"""Inputs of decode_attention that show what may not be read, and how its results are judged.

Yardstick in the same dtype: softmax(q @ k.T) @ v of one sequence in plain torch.
"""

from collections.abc import Callable

import torch
from numerics import draw, judge
from torch import Tensor

from llama2rt.ops import reference


def make(
    heads: int,
    kv_heads: int,
    dim: int,
    page: int,
    dtype: torch.dtype,
    kind: str,
    seed: int,
    lengths: list[int],
) -> tuple[Tensor, ...]:
    """(q, k_cache, v_cache, block_table, lengths), the pages in a random order. What must not be
    read is poison: a page number far outside, and pages of NaN, rows past the end of a sequence's
    last page among them."""
    used = [-(-length // page) for length in lengths]
    q = draw((len(lengths), heads, dim), dtype, "normal", seed)
    k = draw((sum(used) + 2, page, kv_heads, dim), dtype, kind, seed + 1)
    v = draw((sum(used) + 2, page, kv_heads, dim), dtype, kind, seed + 2)
    order = torch.randperm(sum(used) + 2)
    table = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        if length % page:
            for cache in (k, v):
                cache[table[row, count - 1], length % page :] = torch.nan
    for cache in (k, v):
        cache[order[first:]] = torch.nan
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32)


def plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """The yardstick."""
    group, page = q.shape[1] // k.shape[2], k.shape[1]
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // page)].long()
        one, two = (
            x[pages].flatten(0, 1)[:length].repeat_interleave(group, 1).transpose(0, 1)
            for x in (k, v)
        )
        p = (q[row, :, None] @ one.transpose(1, 2) * scale).softmax(-1, dtype=torch.float32)
        out[row] = (p.to(q.dtype) @ two)[:, 0]
    return out


def check(decode_attention: Callable, arguments: tuple[Tensor, ...], scale: float) -> None:
    q, k, v, *indices = arguments
    out = decode_attention(*arguments, scale)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), *indices, scale)
    judge("out", out, exact, plain(*arguments, scale))
    assert not out[arguments[-1] == 0].any(), "length 0 gives 0"
