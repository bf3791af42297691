"""Inputs of decode_attention that show what may not be read, and how its results are judged.

Yardsticks in the same dtype, one sequence at a time: torch's own attention (`sdpa`), or its formula
in plain torch (`softmax_attention`), which rounds the probabilities to that dtype.
"""

import functools
from collections.abc import Callable

import torch
from attention_cases import one_document, softmax_of_one_document
from numerics import draw, judge, wide
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
    *,
    key_kind: str | None = None,
) -> tuple[Tensor, ...]:
    """(q, k_cache, v_cache, block_table, lengths), the pages in a random order.

    `kind` is that of v, and of k where `key_kind` names no other. What must not be read is poison:
    a page number far outside, and pages of NaN, rows past the end of a sequence's last page among
    them.
    """
    used = [-(-length // page) for length in lengths]
    q = draw((len(lengths), heads, dim), dtype, "normal", seed)
    k = draw((sum(used) + 2, page, kv_heads, dim), dtype, key_kind or kind, seed + 1)
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


def sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    document: Callable[..., Tensor] = one_document,
) -> Tensor:
    """[B, Hq, D]; `document` computes each sequence."""
    out, page = torch.zeros_like(q), k_cache.shape[1]
    for row, length in enumerate(lengths.tolist()):
        if length:
            pages = table[row, : -(-length // page)].long()
            k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (k_cache, v_cache))
            out[row] = document(q[row, :, None], k, v, False, scale)[:, 0]
    return out


softmax_attention = functools.partial(sdpa, document=softmax_of_one_document)


def check(
    decode_attention: Callable,
    arguments: tuple[Tensor, ...],
    scale: float,
    yardstick: Callable[..., Tensor] = softmax_attention,
) -> None:
    """Judges one call."""
    q, k, v, *indices = arguments
    out = decode_attention(*arguments, scale)
    exact = reference.decode_attention(*wide(q, k, v), *indices, scale)
    judge("out", out, exact, yardstick(*arguments, scale))
    assert not out[arguments[-1] == 0].any(), "length 0 gives 0"
