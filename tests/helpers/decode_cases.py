"""Inputs of decode_attention that show what may not be read, and how its results are judged.

Yardsticks in the same dtype, one sequence at a time: torch's own attention (`sdpa`), or its formula
in plain torch (`softmax_attention`), which rounds the probabilities to that dtype.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from attention_cases import offsets, one_document, softmax_of_one_document
from numerics import draw, judge, wide
from torch import Tensor

from llama2rt.ops import reference

# Several queries a sequence, against so many cached tokens: none; none against some; a prompt of
# its own tokens alone; queries before the first token; a few over the border of a page; a chunk of
# a prompt; a last one alone.
RAGGED = {
    "queries": [0, 5, 0, 9, 4, 3, 8, 70, 2, 1],
    "lengths": [0, 0, 7, 9, 2, 17, 40, 203, 33, 18],
}


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
    queries: Sequence[int] | None = None,
    common: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """(q, k_cache, v_cache, block_table, lengths), the pages in a random order; `queries` of each
    sequence, one if None; `common`: how many first tokens, a multiple of `page`, each has in common
    with the sequence before it.

    `kind` is that of v, and of k where `key_kind` names no other. What must not be read is poison:
    a page number far outside, and pages of NaN, rows past the end of a sequence's last page among
    them.
    """
    used = [-(-length // page) for length in lengths]
    tokens = len(lengths) if queries is None else sum(queries)
    q = draw((tokens, heads, dim), dtype, "normal", seed)
    k = draw((sum(used) + 2, page, kv_heads, dim), dtype, key_kind or kind, seed + 1)
    v = draw((sum(used) + 2, page, kv_heads, dim), dtype, kind, seed + 2)
    order = torch.randperm(sum(used) + 2)
    table = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        if common is not None and common[row]:
            assert common[row] <= min(lengths[row - 1 : row + 1]) and common[row] % page == 0
            table[row, : common[row] // page] = table[row - 1, : common[row] // page]
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
    cu_q: Tensor | None = None,
    *,
    document: Callable[..., Tensor] = one_document,
) -> Tensor:
    """[T, Hq, D]; `document` computes each sequence."""
    out, page = torch.zeros_like(q), k_cache.shape[1]
    bounds = list(range(len(q) + 1)) if cu_q is None else cu_q.tolist()
    for row, length in enumerate(lengths.tolist()):
        end = bounds[row + 1]
        seeing = slice(max(bounds[row], end - length), end)
        if seeing.start < end:
            pages = table[row, : -(-length // page)].long()
            k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (k_cache, v_cache))
            causal = end - seeing.start > 1
            out[seeing] = document(q[seeing].transpose(0, 1), k, v, causal, scale).transpose(0, 1)
    return out


softmax_attention = functools.partial(sdpa, document=softmax_of_one_document)


def check(
    decode_attention: Callable,
    arguments: tuple[Tensor, ...],
    scale: float,
    yardstick: Callable[..., Tensor] = softmax_attention,
    queries: Sequence[int] | None = None,
) -> None:
    """Judges one call; `queries` as `make` had them."""
    q, k, v, *indices = arguments
    cu_q = None if queries is None else offsets(queries).to(q.device)
    out = decode_attention(*arguments, scale, cu_q)
    exact = reference.decode_attention(*wide(q, k, v), *indices, scale, cu_q)
    judge("out", out, exact, yardstick(*arguments, scale, cu_q))
    lengths = arguments[-1]
    if cu_q is not None:
        lengths = lengths.repeat_interleave(cu_q.diff())
    assert not out[lengths == 0].any(), "length 0 gives 0"
