"""Attention by Hopper's own instructions (csrc/cuda/attention_sm90.cu, attention_sm90_backward.cu).

Never chosen by itself: it has not yet run on a GPU. LLAMA2RT_ATTENTION=sm90 in the environment,
read when llama2rt.ops is imported, chooses it instead of the kernels for sm_80 and later; what it
cannot compute is then an error. Each direction takes the other's results, and those of the kernels
for sm_80.
"""

import os

import torch
from torch import Tensor

from llama2rt.ops.cuda_kernels.attention import sections
from llama2rt.ops.cuda_kernels.device import Device, positive_scale
from llama2rt.ops.tensors import empty_like

VARIABLE = "LLAMA2RT_ATTENTION"
CHOSEN = os.environ.get(VARIABLE, "")
if CHOSEN not in ("", "sm90"):
    raise ValueError(f"{VARIABLE}: expected 'sm90' or nothing, got {CHOSEN!r}")

HEAD_DIMS = (64, 128)
ROWS = 128
"""Query rows, or keys, of a tile."""
MOST = 2**31 - 1
"""Thread blocks of a grid, and coordinates of a tensor map."""


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

    max_seqlen, 0 if unknown, decides in which order tiles run and nothing else. ValueError for
    another dtype than bf16 and fp16, another head dimension than 64 and 128, another GPU than of
    compute capability 9.0, and a build without 90a.
    """
    _check(on, q, k, cu_q)
    q, scale = positive_scale(q, scale)
    out, lse = empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if k.numel() == 0:  # nothing a tensor map could describe
        return out.zero_(), lse.fill_(-torch.inf)
    if q.numel():
        q, k, v, cu_q, cu_k = *map(_mappable, (q, k, v)), cu_q.contiguous(), cu_k.contiguous()
        grid = *sections(on, q, k, max_seqlen), *on.stream(q)
        on.native.attention_sm90(q, k, v, cu_q, cu_k, causal, scale, out, lse, *grid)
    return out, lse


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
    """(dq, dk, dv), bitwise repeatable. ValueError as of `attention`."""
    _check(on, q, k, cu_q)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, q, k, v, out = map(_mappable, (dout, q, k, v, out.contiguous()))
    lse, cu_q, cu_k = (x.contiguous() for x in (lse, cu_q, cu_k))
    delta = torch.empty_like(lse)
    forward = q, k, v, out, lse, cu_q, cu_k, causal, scale
    grid = *sections(on, q, k, max_seqlen), delta, *on.stream(q)
    on.native.attention_sm90_backward(dout, *forward, dq, dk, dv, *grid)
    return dq, dk, dv


def _check(on: Device, q: Tensor, k: Tensor, cu_q: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q: {VARIABLE}=sm90 expects bfloat16 or float16, got {q.dtype}")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q: {VARIABLE}=sm90 expects a head dim of 64 or 128, got {q.shape[2]}")
    for name, x in (("q", q), ("k", k)):
        blocks = (x.shape[0] // ROWS + cu_q.shape[0] - 1) * x.shape[1]
        if max(blocks, x.shape[0]) > MOST:
            raise ValueError(f"{name}: expected at most {MOST} tiles and tokens, got {x.shape}")
    if not q.is_cuda:  # the emulator is whatever a kernel asks for
        return
    if (capability := torch.cuda.get_device_capability(q.device)) != (9, 0):
        raise ValueError(f"q: {VARIABLE}=sm90 expects compute capability 9.0, got {capability}")
    if "90a" not in (built := on.native.ARCHITECTURES):
        raise ValueError(f"{VARIABLE}=sm90 expects a build for 90a, got one for {built}")


def _mappable(x: Tensor) -> Tensor:
    """x itself where a tensor map can describe it, else a copy."""
    token, head, column = x.stride()
    units = (x.data_ptr(), token * x.element_size(), head * x.element_size())
    fits = column == 1 and all(unit % 16 == 0 for unit in units)
    # The driver's rules: a stride spans the dimension before it, in a whole number of its strides.
    if fits and head >= x.shape[2] and token >= head * x.shape[1] and token % head == 0:
        return x
    return empty_like(x).copy_(x)
