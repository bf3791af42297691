"""Attention over packed documents."""

import torch
from torch import Tensor

from llama2rt.ops.cuda_kernels.device import DTYPES, Device, empty, positive_scale

WIDEST_HEAD = 256


def _aligned(x: Tensor) -> Tensor:
    """x itself where rows can be copied 16 bytes at a time; else a copy, padded with zeros.

    That asks for rows that start at multiples of 16 bytes and have a multiple of 8 elements.
    """
    unit = 16 // x.element_size()
    if (
        x.stride(2) == 1
        and x.shape[2] % 8 == 0
        and x.stride(0) % unit == 0
        and x.stride(1) % unit == 0
        and x.data_ptr() % 16 == 0
    ):
        return x
    padded = x.new_zeros(*x.shape[:2], -(-x.shape[2] // 8) * 8)
    padded[..., : x.shape[2]] = x
    return padded


def _section(on: Device, x: Tensor, longest: int, heads: int, kv_heads: int) -> int:
    """Key heads that thread blocks work on at a time: what they all read fits half of the cache.

    They read two tensors like x of `heads` heads, for documents of up to `longest` tokens. The
    other half is for what each reads once.
    """
    read = 2 * longest * x.shape[2] * x.element_size() * heads // kv_heads
    return max(1, min(kv_heads, on.cache_bytes(x) // 2 // max(1, read)))


def arguments(
    on: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple:
    """What the kernels take, in the order of the binding; tensors laid out as they want them."""
    tokens, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    longest = max_seqlen or tokens
    return (
        DTYPES[q.dtype],
        (cu_q.shape[0] - 1, tokens, keys, heads, kv_heads, dim),
        *((on.address(cu), cu.dtype == torch.int64) for cu in (cu_q, cu_k)),
        *((on.address(x), x.stride(0), x.stride(1)) for x in (q, k, v)),
        causal,
        scale,
        _section(on, k, longest, kv_heads, kv_heads),
        _section(on, q, longest, heads, kv_heads),
        on.address(out),
        on.address(lse),
        *on.stream(q),
    )


def attention(
    on: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, D], natural log-sum-exp of the scaled scores [Hq, Tq] fp32).

    max_seqlen, 0 if unknown, decides in which order tiles run and nothing else.
    """
    dim = q.shape[2]
    if dim > WIDEST_HEAD:
        raise ValueError(f"q: expected a head dimension of at most {WIDEST_HEAD}, got {dim}")
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if q.numel() == 0:
        return empty(q), lse
    q, scale = positive_scale(q, scale)
    q, k, v, cu_q, cu_k = *map(_aligned, (q, k, v)), cu_q.contiguous(), cu_k.contiguous()
    out = empty(q)
    on.native.attention(*arguments(on, q, k, v, cu_q, cu_k, max_seqlen, causal, scale, out, lse))
    return out[..., :dim].contiguous(), lse


def attention_backward(
    on: Device,
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
    """(dq, dk, dv), bitwise repeatable."""
    if q.numel() == 0:
        return empty(q), torch.zeros_like(k), torch.zeros_like(v)
    dim = q.shape[2]
    dout, q, k, v, out = map(_aligned, (dout, q, k, v, out.contiguous()))
    lse, cu_q, cu_k = lse.contiguous(), cu_q.contiguous(), cu_k.contiguous()
    dq, dk, dv, delta = empty(q), empty(k), empty(v), torch.empty_like(lse)
    on.native.attention_backward(
        *arguments(on, q, k, v, cu_q, cu_k, max_seqlen, causal, scale, out, lse),
        (on.address(dout), dout.stride(0), dout.stride(1)),
        *map(on.address, (delta, dq, dk, dv)),
    )
    return dq[..., :dim].contiguous(), dk[..., :dim].contiguous(), dv[..., :dim].contiguous()
