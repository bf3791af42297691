"""Attention over packed documents."""

import torch
from torch import Tensor

from llama2rt.ops.cuda_kernels.device import Device, positive_scale
from llama2rt.ops.tensors import empty_like

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


def sections(on: Device, q: Tensor, k: Tensor, max_seqlen: int) -> tuple[int, int]:
    """Key heads whose keys, or whose queries, thread blocks work on at a time."""
    heads, kv_heads, longest = q.shape[1], k.shape[1], max_seqlen or q.shape[0]
    return _section(on, k, longest, kv_heads, kv_heads), _section(on, q, longest, heads, kv_heads)


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
        return empty_like(q), lse
    q, scale = positive_scale(q, scale)
    q, k, v, cu_q, cu_k = *map(_aligned, (q, k, v)), cu_q.contiguous(), cu_k.contiguous()
    out = empty_like(q)
    grid = *sections(on, q, k, max_seqlen), *on.stream(q)
    on.native.attention(q, k, v, cu_q, cu_k, causal, scale, out, lse, *grid)
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
        return empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dim = q.shape[2]
    dout, q, k, v, out = map(_aligned, (dout, q, k, v, out.contiguous()))
    lse, cu_q, cu_k = lse.contiguous(), cu_q.contiguous(), cu_k.contiguous()
    dq, dk, dv, delta = empty_like(q), empty_like(k), empty_like(v), torch.empty_like(lse)
    forward = q, k, v, out, lse, cu_q, cu_k, causal, scale
    grid = *sections(on, q, k, max_seqlen), delta, *on.stream(q)
    on.native.attention_backward(dout, *forward, dq, dk, dv, *grid)
    return dq[..., :dim].contiguous(), dk[..., :dim].contiguous(), dv[..., :dim].contiguous()
