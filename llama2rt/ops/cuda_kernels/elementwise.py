"""RMSNorm."""

import torch
from torch import Tensor

from llama2rt.ops.cuda_kernels.device import DTYPES, Device, empty, rows


def rms_norm(on: Device, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], weight [N] -> (y, rstd [T] fp32)."""
    x, weight = rows(x), weight.contiguous()
    y, rstd = empty(x), x.new_empty(x.shape[0], dtype=torch.float32)
    on.native.rms_norm(
        DTYPES[x.dtype],
        *x.shape,
        on.address(x),
        x.stride(0),
        on.address(weight),
        eps,
        on.address(y),
        on.address(rstd),
        *on.stream(x),
    )
    return y, rstd


def rms_norm_backward(
    on: Device, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight); bitwise repeatable on one model of GPU."""
    dy, x, weight, rstd = rows(dy), rows(x), weight.contiguous(), rstd.contiguous()
    # Two thread blocks on each multiprocessor: one computes while the other waits for memory.
    blocks = max(1, min(2 * on.multiprocessors(x), x.shape[0]))
    dx, dweight = empty(x), empty(weight)
    partial = x.new_empty(blocks, x.shape[1], dtype=torch.float32)
    on.native.rms_norm_backward(
        DTYPES[x.dtype],
        *x.shape,
        on.address(dy),
        dy.stride(0),
        on.address(x),
        x.stride(0),
        on.address(weight),
        on.address(rstd),
        on.address(dx),
        on.address(dweight),
        on.address(partial),
        blocks,
        *on.stream(x),
    )
    return dx, dweight
