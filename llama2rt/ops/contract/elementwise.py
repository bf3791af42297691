"""rms_norm, add_rms_norm, swiglu and rope: what works on each token by itself."""

from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend
from llama2rt.ops.checks import check_floating, check_index, check_like, check_rows, mismatch
from llama2rt.ops.registration import autograd, define
from llama2rt.ops.tensors import empty_like, wide_dtype

# --- rms_norm ---------------------------------------------------------------------------------

_run_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
    lambda x, weight, eps, backend: (empty_like(x), x.new_empty(x.shape[0], dtype=wide_dtype(x))),
)
_run_rms_norm_backward = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, str backend)"
    " -> (Tensor, Tensor)",
    lambda dy, x, weight, rstd, backend: (empty_like(x), empty_like(weight)),
)


def _rms_norm_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _rms_norm_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple:
    if dy is None:
        return None, None, None, None
    return *_run_rms_norm_backward(dy, *ctx.saved_tensors, ctx.backend), None, None


autograd("rms_norm", _rms_norm_backward, _rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation: x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., N] and weight [N], one floating dtype; returns x's shape and dtype. Statistics in fp32.
    Source: Zhang and Sennrich 2019; Llama 2, section 2.2. ValueError on a mismatch.
    """
    check_rows("x", x)
    check_like("weight", weight, x, "x", (x.shape[-1],))
    choice = backend.resolve(x)
    if x.dim() == 2:
        return _run_rms_norm(x, weight, eps, choice)[0]
    return _run_rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, choice)[0].view(x.shape)


# --- add_rms_norm -----------------------------------------------------------------------------

_run_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps, backend: (
        empty_like(x),
        empty_like(x),
        x.new_empty(x.shape[0], dtype=wide_dtype(x)),
    ),
)
_run_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor dy, Tensor? dsummed, Tensor summed, Tensor weight, Tensor rstd,"
    " str backend) -> (Tensor, Tensor)",
    lambda dy, dsummed, summed, weight, rstd, backend: (empty_like(summed), empty_like(weight)),
)


def _add_rms_norm_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, weight, _, ctx.backend = inputs
    _, summed, rstd = output
    ctx.save_for_backward(summed, weight, rstd)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)


def _add_rms_norm_backward(
    ctx: Any, dy: Tensor | None, dsummed: Tensor | None, _: Tensor | None
) -> tuple:
    if dy is None:  # the normed half went unused
        return dsummed, dsummed, None, None, None
    dx, dweight = _run_add_rms_norm_backward(dy, dsummed, *ctx.saved_tensors, ctx.backend)
    return dx, dx, dweight, None, None


autograd("add_rms_norm", _add_rms_norm_backward, _add_rms_norm_setup)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm that follows it: (rms_norm(x + residual), x + residual).

    x and residual [..., N], weight [N], one floating dtype; both results have x's shape and dtype.
    The norm is taken of the sum as rounded to that dtype. ValueError on a mismatch.
    """
    check_rows("x", x)
    check_like("residual", residual, x, "x", x.shape)
    check_like("weight", weight, x, "x", (x.shape[-1],))
    choice = backend.resolve(x)
    if x.dim() == 2:
        return _run_add_rms_norm(x, residual, weight, eps, choice)[:2]
    rows = (-1, x.shape[-1])
    y, summed, _ = _run_add_rms_norm(x.reshape(rows), residual.reshape(rows), weight, eps, choice)
    return y.view(x.shape), summed.view(x.shape)


# --- swiglu -----------------------------------------------------------------------------------

_run_swiglu = define(
    "swiglu(Tensor gate, Tensor up, str backend) -> Tensor",
    lambda gate, up, backend: empty_like(gate),
)
_run_swiglu_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    lambda dy, gate, up, backend: (empty_like(gate), empty_like(up)),
)


def _swiglu_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _swiglu_backward(ctx: Any, dy: Tensor | None) -> tuple:
    return *_run_swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None


autograd("swiglu", _swiglu_backward, _swiglu_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise: the gated half of a SwiGLU feed-forward layer.

    gate and up [..., F], one floating dtype; returns their shape and dtype, computed in fp32.
    Source: Shazeer 2020; Llama 2, section 2.2. ValueError on a mismatch.
    """
    check_rows("gate", gate)
    check_like("up", up, gate, "gate", gate.shape)
    choice = backend.resolve(gate)
    if gate.dim() == 2:
        return _run_swiglu(gate, up, choice)
    rows = (-1, gate.shape[-1])
    return _run_swiglu(gate.reshape(rows), up.reshape(rows), choice).view(gate.shape)


# --- rope -------------------------------------------------------------------------------------

_run_rope = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, str backend)"
    " -> (Tensor, Tensor)",
    lambda q, k, cos, sin, positions, backend: (empty_like(q), empty_like(k)),
)
_run_rope_backward = define(
    "rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor positions, str backend)"
    " -> (Tensor, Tensor)",
    lambda dq, dk, cos, sin, positions, backend: (empty_like(dq), empty_like(dk)),
)


def _rope_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, cos, sin, positions, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rope_backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple:
    return *_run_rope_backward(dq, dk, *ctx.saved_tensors, ctx.backend), None, None, None, None


autograd("rope", _rope_backward, _rope_setup)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, half-split pairs as in Hugging Face weights.

    q [T, Hq, D] and k [T, Hkv, D], one floating dtype; cos and sin [P, D/2], fp32 (or fp64);
    positions [T], int32 or int64, 0 <= position < P. Element i is paired with i + D/2:
    (a, b) -> (a cos - b sin, b cos + a sin), in fp32. Returns new tensors of q's and k's shapes;
    one of them may have no heads.
    Source: Su et al. 2021. ValueError on a mismatch, and (reference, CPU) on a position outside.
    """
    check_floating("q", q)
    if q.dim() != 3 or q.shape[2] % 2:
        raise mismatch("q", "shape [T, Hq, D] with D even", q.shape)
    if k.dim() != 3:
        raise mismatch("k", "shape [T, Hkv, D]", k.shape)
    check_like("k", k, q, "q", (q.shape[0], k.shape[1], q.shape[2]))
    if cos.dim() != 2 or cos.shape[1] * 2 != q.shape[2]:
        raise mismatch("cos", f"shape [P, {q.shape[2] // 2}]", cos.shape)
    if cos.dtype != torch.float32 and cos.dtype != torch.float64:
        raise mismatch("cos", "dtype float32 or float64", cos.dtype)
    if cos.device != q.device:
        raise mismatch("cos", f"device {q.device} (that of q)", cos.device)
    check_like("sin", sin, cos, "cos", cos.shape)
    check_index("positions", positions, q, "q", (q.shape[0],))
    return _run_rope(q, k, cos, sin, positions, backend.resolve(q))
