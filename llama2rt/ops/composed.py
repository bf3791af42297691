"""Fast compositions of torch calls, for every op a backend has no native kernel for.

Written for the CPU (they run on any device): no [T, V] logits in memory, attention of packed
documents in a few batched calls. Same signatures and semantics as `reference`, same rounding to the dtype.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from llama2rt.ops import reference
from llama2rt.ops.reference import (  # the oracle's text is already what torch does best
    add_rms_norm,
    add_rms_norm_backward,
    check_lengths,
    check_targets,
    rms_norm,
    rms_norm_backward,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
)

__all__ = [
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "decode_attention",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_backward",
    "swiglu",
    "swiglu_backward",
    "token_logprob",
    "token_logprob_backward",
]

# Documents padded to a common length waste work on padding; batched ones save calls. Neighbours in
# length share a batch while the padding stays below this share of it.
PADDING = 0.2


class Group(NamedTuple):
    """Documents of similar length that attention handles as one padded batch."""

    length: int
    rows: Tensor  # [n * length] row of q, k, v behind each padded row
    valid: Tensor | None  # [n * length] True where a padded row is a document's own; None: all are
    contiguous: bool  # rows are a plain range: views instead of copies


@functools.lru_cache(maxsize=64)
def _groups(bounds: tuple[int, ...], causal: bool) -> list[Group]:
    """Split the documents of a batch into groups for batched attention (same for every layer)."""
    lengths = [(end - start, start) for start, end in itertools.pairwise(bounds)]
    lengths = sorted((pair for pair in lengths if pair[0]), reverse=True)
    groups = []
    first = 0
    while first < len(lengths):
        longest, total, last = lengths[first][0], 0, first
        # Padding sits after a document's end, where a causal mask hides it; without one, none.
        while last < len(lengths):
            filled = total + lengths[last][0]
            padding = 1 - filled / ((last + 1 - first) * longest)
            if padding > (PADDING if causal else 0.0):
                break
            total, last = filled, last + 1
        members = sorted(lengths[first:last], key=lambda pair: pair[1])
        first = last
        size = torch.tensor([pair[0] for pair in members])[:, None]
        start = torch.tensor([pair[1] for pair in members])[:, None]
        offset = torch.arange(longest)[None]
        rows = (start + torch.minimum(offset, size - 1)).flatten()
        valid = (offset < size).flatten()
        contiguous = bool((rows.diff() == 1).all())
        groups.append(Group(longest, rows, None if bool(valid.all()) else valid, contiguous))
    return groups


def _take(x: Tensor, group: Group) -> Tensor:
    """[T, H, D] -> [n, H, length, D], the documents of a group."""
    if group.contiguous:
        first = int(group.rows[0])
        picked = x[first : first + group.rows.shape[0]]
    else:
        picked = x.index_select(0, group.rows.to(x.device))
    return picked.unflatten(0, (-1, group.length)).transpose(1, 2)


def _put(out: Tensor, group: Group, value: Tensor) -> None:
    """Write [n, H, length, D] back into out [T, H, D]."""
    value = value.transpose(1, 2).flatten(0, 1)
    if group.contiguous:
        first = int(group.rows[0])
        out[first : first + value.shape[0]] = value
        return
    rows = group.rows.to(out.device)
    if group.valid is not None:
        valid = group.valid.to(out.device)
        rows, value = rows[valid], value[valid]
    out.index_copy_(0, rows, value)


def _self_attention(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[int, ...] | None:
    """Document bounds where queries and keys share them on a CPU, else None."""
    if q.device.type != "cpu" or q.shape[0] != k.shape[0] or not torch.equal(cu_q, cu_k):
        return None
    return tuple(check_lengths(cu_q, q.shape[0], "cu_seqlens"))


def _expand(x: Tensor, heads: int) -> Tensor:
    """[n, Hkv, L, D] -> [n, H, L, D]: each key/value head once per query head of its group."""
    group = heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


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
    bounds = _self_attention(q, k, cu_q, cu_k)
    if bounds is None:
        return reference.attention(q, k, v, cu_q, cu_k, max_seqlen, causal, scale)
    tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(tokens, heads, 1, dtype=wide)
    for group in _groups(bounds, causal):
        o, s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _take(q, group),
            _expand(_take(k, group), heads),
            _expand(_take(v, group), heads),
            0.0,
            causal,
            scale=scale,
        )
        _put(out, group, o)
        _put(lse, group, s[..., None])
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
    bounds = _self_attention(q, k, cu_q, cu_k)
    if bounds is None:
        return reference.attention_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, max_seqlen, causal, scale
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for group in _groups(bounds, causal):
        upstream = _take(dout, group)
        if group.valid is not None:
            upstream = upstream * group.valid.view(-1, 1, group.length, 1).to(upstream.dtype)
        gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream,
            _take(q, group),
            _expand(_take(k, group), heads),
            _expand(_take(v, group), heads),
            _take(out, group),
            _take(lse.T[..., None], group)[..., 0],
            0.0,
            causal,
            scale=scale,
        )
        if heads != kv_heads:
            gk, gv = (
                g.unflatten(1, (kv_heads, -1)).sum(2, dtype=lse.dtype).to(g.dtype) for g in (gk, gv)
            )
        _put(dq, group, gq)
        _put(dk, group, gk)
        _put(dv, group, gv)
    return dq, dk, dv


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    rows, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    longest = int(lengths.max()) if rows else 0
    if longest == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    pages = block_table[:, : -(-longest // page)]
    # Table entries past a sequence's end may hold anything; page 0 stands in for them.
    used = torch.arange(pages.shape[1], device=q.device) * page < lengths[:, None]
    pages = torch.where(used, pages, 0).flatten()
    k, v = (
        cache.index_select(0, pages).view(rows, -1, kv_heads, dim).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
    scores = (grouped @ k.transpose(2, 3)).to(wide).mul_(scale)
    hidden = torch.arange(k.shape[2], device=q.device) >= lengths[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    # A page beyond the length may hold NaN or inf, which 0 * would spread: not read, but zeroed.
    v = v.masked_fill(hidden[:, None, :, None], 0)
    probabilities = scores.softmax(-1).nan_to_num_(0.0).to(q.dtype)
    return (probabilities @ v).reshape(rows, heads, dim).contiguous()


# Logits are formed in tiles of about this many elements: small enough to stay in a core's cache
# between the GEMM and the elementwise passes, large enough for the GEMM.
TILE = 1 << 20


def _row_chunks(tokens: int, vocabulary: int) -> range:
    rows = max(16, min(math.ceil(tokens / 8), TILE // max(vocabulary, 1)))
    return range(0, tokens, rows)


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if hidden.device.type == "cpu":
        check_targets(targets, vocabulary)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    lse, chosen, mean = torch.empty(3, tokens, dtype=wide, device=hidden.device)
    index = targets.clamp_min(0).long()[:, None]
    chunks = _row_chunks(tokens, vocabulary)
    for start in chunks:
        part = slice(start, start + chunks.step)
        logits = torch.mm(hidden[part], weight.T).to(wide)
        if temperature != 1.0:
            logits /= temperature
        chosen[part] = logits.gather(1, index[part])[:, 0]
        torch.logsumexp(logits, -1, out=lse[part])
        if entropy:
            p = (logits - lse[part, None]).exp_()
            mean[part] = torch.linalg.vecdot(p, logits)
    predicted = targets >= 0
    logprob = torch.where(predicted, chosen - lse, 0.0)
    uncertainty = torch.where(predicted, lse - mean, 0.0) if entropy else lse.new_empty(0)
    return logprob, uncertainty, lse.clone()


def token_logprob_backward(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    predicted = targets >= 0
    index = targets.clamp_min(0).long()[:, None]
    upstream = torch.where(predicted, dlogprob, 0.0)[:, None] / temperature
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = torch.zeros(vocabulary, hidden.shape[1], dtype=lse.dtype, device=hidden.device)
    chunks = _row_chunks(tokens, vocabulary)
    for start in chunks:
        part = slice(start, start + chunks.step)
        log_p = torch.mm(hidden[part], weight.T).to(lse.dtype)
        if temperature != 1.0:
            log_p /= temperature
        log_p -= lse[part, None]
        p = log_p.exp()
        if dentropy is not None and entropy is not None:
            share = torch.where(predicted[part], dentropy[part], 0.0)[:, None] / temperature
            p *= -upstream[part] - share * (log_p + entropy[part, None])
        else:
            p *= -upstream[part]
        p.scatter_add_(1, index[part], upstream[part])
        dlogits = p.to(hidden.dtype)
        dhidden[part] = torch.mm(dlogits, weight)
        if dlogits.dtype == dweight.dtype:
            dweight.addmm_(dlogits.T, hidden[part])
        else:
            dweight += torch.mm(dlogits.T, hidden[part])
    return dhidden, dweight.to(weight.dtype)
