"""Attention over packed documents, and of sequences' last queries against their paged caches."""

import torch
from torch import Tensor

from llama2rt import _cpu  # after torch (see CMakeLists.txt)
from llama2rt.ops.reference import check_lengths
from llama2rt.ops.tensors import empty_like, last_contiguous


def _offsets(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.long().contiguous()


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
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> (out, lse [Hq, Tq] fp32). ValueError on offsets."""
    check_lengths(cu_q, q.shape[0], "cu_seqlens")
    check_lengths(cu_k, k.shape[0], "cu_seqlens_k")
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    cu = _offsets(cu_q), _offsets(cu_k)
    out, lse = empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _cpu.attention(q, k, v, *cu, causal, scale, out, lse, torch.get_num_threads())
    return out, lse


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
    """(gradients of q, k and v). ValueError on offsets."""
    check_lengths(cu_q, q.shape[0], "cu_seqlens")
    check_lengths(cu_k, k.shape[0], "cu_seqlens_k")
    operands = *map(last_contiguous, (dout, q, k, v)), out.contiguous(), lse.contiguous()
    gradients = empty_like(q), empty_like(k), empty_like(v)
    cu = _offsets(cu_q), _offsets(cu_k)
    _cpu.attention_backward(*operands, *cu, causal, scale, *gradients, torch.get_num_threads())
    return gradients


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], caches [pages, page, Hkv, D] -> [T, Hq, D]. ValueError on a page, length or
    offset."""
    q, caches = last_contiguous(q), (last_contiguous(k_cache), last_contiguous(v_cache))
    table = block_table.int().contiguous(), lengths.int().contiguous()
    offsets = None
    if cu_q is not None:
        check_lengths(cu_q, q.shape[0], "cu_seqlens_q")
        offsets = _offsets(cu_q)
    out = empty_like(q)
    _cpu.decode_attention(q, *caches, *table, scale, offsets, out, torch.get_num_threads())
    return out
