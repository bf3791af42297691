"""RMSNorm, SwiGLU and rotary embedding: the ops that are bound by memory alone."""

import torch
from torch import Tensor

from llama2rt.ops.cuda_kernels.device import Device
from llama2rt.ops.tensors import empty_like, last_contiguous

# Thread blocks for each multiprocessor. The backward pass of RMSNorm keeps one row of partial sums
# for each block: two blocks, so that one computes while the other waits for memory, where registers
# let both run. The others have blocks of 128 threads; 16 of them are the 2048 threads that a
# multiprocessor holds at most, and fewer run at once where registers bound them.
RMS_NORM_BACKWARD_BLOCKS = 2
ELEMENTWISE_BLOCKS = 16


def _rms_norm(
    on: Device, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, weight = last_contiguous(x), weight.contiguous()
    y, rstd = empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    summed = None
    if residual is not None:
        residual, summed = last_contiguous(residual), empty_like(x)
    on.native.rms_norm(x, residual, weight, eps, y, summed, rstd, *on.stream(x))
    return y, summed, rstd


def rms_norm(on: Device, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], weight [N] -> (y, rstd [T] fp32)."""
    y, _, rstd = _rms_norm(on, x, None, weight, eps)
    return y, rstd


def add_rms_norm(
    on: Device, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [T, N], weight [N] -> (y, x + residual, rstd [T] fp32)."""
    y, summed, rstd = _rms_norm(on, x, residual, weight, eps)
    assert summed is not None
    return y, summed, rstd


def add_rms_norm_backward(
    on: Device, dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, equal to that of residual; gradient of weight); the same bits every time, on
    one model of GPU."""
    dy, x, weight, rstd = (
        last_contiguous(dy),
        last_contiguous(summed),
        weight.contiguous(),
        rstd.contiguous(),
    )
    if dsummed is not None:
        dsummed = last_contiguous(dsummed)
    blocks = max(1, min(RMS_NORM_BACKWARD_BLOCKS * on.multiprocessors(x), x.shape[0]))
    dx, dweight = empty_like(x), empty_like(weight)
    partial = x.new_empty(blocks, x.shape[1], dtype=torch.float32)
    results = dx, dweight, partial
    on.native.rms_norm_backward(dy, dsummed, x, weight, rstd, *results, *on.stream(x))
    return dx, dweight


def rms_norm_backward(
    on: Device, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight)."""
    return add_rms_norm_backward(on, dy, None, x, weight, rstd)


def _as_one_row(*operands: Tensor) -> list[Tensor]:
    """The operands as matrices of one row where all are dense, else as they are."""
    if all(x.is_contiguous() for x in operands):
        return [x.view(1, -1) for x in operands]
    return [last_contiguous(x) for x in operands]


def swiglu(on: Device, gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [T, F] -> silu(gate) * up."""
    y = empty_like(gate)
    gate, up = _as_one_row(gate, up)
    blocks = ELEMENTWISE_BLOCKS * on.multiprocessors(gate)
    on.native.swiglu(gate, up, y, blocks, *on.stream(gate))
    return y


def swiglu_backward(on: Device, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate, gradient of up)."""
    dgate, dup = empty_like(gate), empty_like(up)
    dy, gate, up = _as_one_row(dy, gate, up)
    blocks = ELEMENTWISE_BLOCKS * on.multiprocessors(gate)
    on.native.swiglu_backward(dy, gate, up, dgate, dup, blocks, *on.stream(gate))
    return dgate, dup


def _rope(
    on: Device, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, positions = last_contiguous(q), last_contiguous(k), positions.contiguous()
    tables = cos.float().contiguous(), sin.float().contiguous()
    out = empty_like(q), empty_like(k)
    blocks = ELEMENTWISE_BLOCKS * on.multiprocessors(q)
    on.native.rope(q, k, *tables, positions, inverse, *out, blocks, *on.stream(q))
    return out


def rope(
    on: Device, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], tables [P, D/2] -> both rotated; NaN for a position outside."""
    return _rope(on, q, k, cos, sin, positions, inverse=False)


def rope_backward(
    on: Device, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients rotated back."""
    return _rope(on, dq, dk, cos, sin, positions, inverse=True)
