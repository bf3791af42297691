"""Causal or full attention over packed documents in batched torch calls, made for CPUs.

torch's own CPU flash attention has no notion of packed documents, and its bf16 backward is slow on
short ones. Here documents of similar length share one padded batch, cut into tiles of scores that
stay in cache, and a query block meets no keys beyond its causal reach. Scores, softmax and their
gradients are fp32; GEMMs with probabilities or score gradients run in the input's dtype.

Left out: keys and queries of different lengths (`reference` serves those) and GPUs.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llama2rt.ops import reference
from llama2rt.ops.reference import check_lengths

# Documents share a batch while padding stays below this share of its rows: less wastes calls on
# tiny batches, more wastes the GEMMs.
PADDING = 0.2
# Queries per block. A long document's scores are formed block by block against the keys so far.
BLOCK = 128
# Scores per tile: 1 MiB of fp32, what a core's second-level cache holds on current servers.
TILE = 1 << 18


class Group(NamedTuple):
    """Documents of similar length, padded to the longest and handled as one batch."""

    length: int
    rows: Tensor  # [n, length] row of q, k, v behind each padded row
    valid: Tensor | None  # [n, length] False where a row is padding; None where there is none


@functools.lru_cache(maxsize=64)  # a model's layers ask for the same batch one after another
@torch.inference_mode(False)  # sampling may fill the cache that training reads
def _groups(bounds: tuple[int, ...], heads: int, causal: bool) -> list[Group]:
    documents = [(end - start, start) for start, end in itertools.pairwise(bounds) if end > start]
    documents.sort(key=lambda document: (-document[0], document[1]))
    groups: list[Group] = []
    first = 0
    while first < len(documents):
        longest, filled, last = documents[first][0], 0, first
        most = max(1, TILE // (heads * longest * min(longest, BLOCK)))
        while last < len(documents) and last - first < most:
            padded = (last + 1 - first) * longest
            # Padding follows a document's end, where a causal mask hides it; without one, none.
            if filled + documents[last][0] < padded * (1 - PADDING * causal):
                break
            filled, last = filled + documents[last][0], last + 1
        size = torch.tensor([length for length, _ in documents[first:last]])[:, None]
        start = torch.tensor([start for _, start in documents[first:last]])[:, None]
        offset = torch.arange(longest)[None]
        valid = offset < size
        rows = start + torch.minimum(offset, size - 1)
        groups.append(Group(longest, rows, None if bool(valid.all()) else valid))
        first = last
    return groups


def _take(x: Tensor, group: Group, heads: int) -> Tensor:
    """[T, h, D] -> [n * heads, length, D]: a group's documents, key heads repeated per query."""
    documents = x.index_select(0, group.rows.view(-1)).view(*group.rows.shape, *x.shape[1:])
    documents = documents.transpose(1, 2)
    if x.shape[1] != heads:
        documents = documents.repeat_interleave(heads // x.shape[1], 1)
    return documents.reshape(-1, group.length, x.shape[2])


def _put(out: Tensor, group: Group, value: Tensor) -> None:
    """Write [n * h, length, D] into out [T, h, D], padding dropped."""
    value = value.view(group.rows.shape[0], -1, group.length, value.shape[2]).transpose(1, 2)
    if group.valid is None:
        out.index_copy_(0, group.rows.view(-1), value.reshape(-1, *out.shape[1:]))
    else:
        out.index_copy_(0, group.rows[group.valid], value[group.valid])


def _score_tiles(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, keys, scores) for each block of queries, causal mask applied."""
    length = q.shape[1]
    for start in range(0, length, BLOCK):
        queries = slice(start, min(start + BLOCK, length))
        keys = slice(0, queries.stop if causal else length)
        scores = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2))
        if causal:
            scores[:, :, start:] += _causal_bias(scores.shape[1], scores.dtype)
        yield queries, keys, scores


@functools.lru_cache(maxsize=2 * BLOCK)
@torch.inference_mode(False)
def _causal_bias(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), -torch.inf, dtype=dtype).triu_(1)


def _bounds(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[int, ...] | None:
    """Document bounds where keys share the queries' and all is on a CPU, else None."""
    if q.device.type != "cpu" or q.shape[0] != k.shape[0] or not torch.equal(cu_q, cu_k):
        return None
    return tuple(check_lengths(cu_q, q.shape[0], "cu_seqlens"))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    bounds = _bounds(q, k, cu_q, cu_k)
    if bounds is None:
        return reference.attention(q, k, v, cu_q, cu_k, max_seqlen, causal, scale)
    tokens, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(tokens, heads, 1, dtype=wide)
    for group in _groups(bounds, heads, causal):
        gq, gk, gv = (_take(x, group, heads) for x in (q, k, v))
        gout, glse = torch.empty_like(gq), torch.empty(*gq.shape[:2], 1, dtype=wide)
        for queries, keys, scores in _score_tiles(gq.to(wide) * scale, gk.to(wide), causal):
            probabilities = scores.softmax(-1)
            # softmax computed the log-sum-exp and kept it; the largest entry gives it back.
            largest = probabilities.amax(-1, keepdim=True).log_()
            glse[:, queries] = scores.amax(-1, keepdim=True).sub_(largest)
            gout[:, queries] = torch.bmm(probabilities.to(q.dtype), gv[:, keys])
        _put(out, group, gout)
        _put(lse, group, glse)
    return out, lse[..., 0].T.contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = _bounds(q, k, cu_q, cu_k)
    if bounds is None:
        return reference.attention_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, max_seqlen, causal, scale
        )
    heads, kv_heads, wide = q.shape[1], k.shape[1], lse.dtype
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for group in _groups(bounds, heads, causal):
        gq, gk, gv, gdout = (_take(x, group, heads) for x in (q, k, v, dout))
        if group.valid is not None:  # a padded row repeats a real one, whose gradient counts once
            own = group.valid.repeat_interleave(heads, 0)[..., None]
            gdout = gdout * own.to(gdout.dtype)
        wide_dout, wide_v = gdout.to(wide), gv.to(wide)
        gdq = torch.empty_like(wide_dout)
        gdk, gdv = torch.zeros_like(wide_dout), torch.zeros_like(wide_dout)
        for queries, keys, scores in _score_tiles(gq.to(wide) * scale, gk.to(wide), causal):
            # Not exp(scores - lse), nor rowsum(dout * out) as in flash attention: on whole rows the
            # softmax and its gradient cost no more, and do not inherit the rounding of lse and out.
            p = scores.softmax(-1)
            gdv[:, keys] += torch.bmm(p.to(q.dtype).transpose(1, 2), gdout[:, queries])
            dp = torch.bmm(wide_dout[:, queries], wide_v[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(dp, p, -1, wide).to(q.dtype)
            gdq[:, queries] = torch.bmm(dscores, gk[:, keys])
            gdk[:, keys] += torch.bmm(dscores.transpose(1, 2), gq[:, queries])
        _put(dq, group, gdq.mul_(scale).to(q.dtype))
        for target, value in ((dk, gdk.mul_(scale)), (dv, gdv)):
            if heads != kv_heads:
                value = value.view(-1, heads // kv_heads, *value.shape[1:]).sum(1)
            _put(target, group, value.to(q.dtype))
    return dq, dk, dv
