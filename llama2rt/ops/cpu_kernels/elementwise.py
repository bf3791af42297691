"""RMSNorm, SwiGLU and rotary embedding: the ops that are bound by memory alone."""

import torch
from torch import Tensor

# After torch, whose OpenMP runtime the module then shares (see CMakeLists.txt).
from llama2rt import _cpu
from llama2rt.ops.tensors import empty_like, last_contiguous


def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, weight = last_contiguous(x), weight.contiguous()
    y, rstd = empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    summed = None
    if residual is not None:
        residual, summed = last_contiguous(residual), empty_like(x)
    _cpu.rms_norm(x, residual, weight, eps, y, summed, rstd, torch.get_num_threads())
    return y, summed, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], weight [N] -> (y, rstd [T] fp32)."""
    y, _, rstd = _rms_norm(x, None, weight, eps)
    return y, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [T, N], weight [N] -> (y, x + residual, rstd [T] fp32)."""
    y, summed, rstd = _rms_norm(x, residual, weight, eps)
    assert summed is not None
    return y, summed, rstd


def add_rms_norm_backward(
    dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, equal to that of residual; gradient of weight)."""
    dy, x = last_contiguous(dy), last_contiguous(summed)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    if dsummed is not None:
        dsummed = last_contiguous(dsummed)
    dx, dweight = empty_like(x), empty_like(weight)
    _cpu.rms_norm_backward(dy, dsummed, x, weight, rstd, dx, dweight, torch.get_num_threads())
    return dx, dweight


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight)."""
    return add_rms_norm_backward(dy, None, x, weight, rstd)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [T, F] -> silu(gate) * up."""
    gate, up = last_contiguous(gate), last_contiguous(up)
    y = empty_like(gate)
    _cpu.swiglu(gate, up, y, torch.get_num_threads())
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate, gradient of up)."""
    dy, gate, up = last_contiguous(dy), last_contiguous(gate), last_contiguous(up)
    dgate, dup = empty_like(gate), empty_like(up)
    _cpu.swiglu_backward(dy, gate, up, dgate, dup, torch.get_num_threads())
    return dgate, dup


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, positions = last_contiguous(q), last_contiguous(k), positions.contiguous()
    tables = cos.float().contiguous(), sin.float().contiguous()
    out = empty_like(q), empty_like(k)
    _cpu.rope(q, k, *tables, positions, inverse, *out, torch.get_num_threads())
    return out


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], tables [P, D/2] -> both rotated. ValueError on a position."""
    return _rope(q, k, cos, sin, positions, inverse=False)


def rope_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients rotated back."""
    return _rope(dq, dk, cos, sin, positions, inverse=True)
