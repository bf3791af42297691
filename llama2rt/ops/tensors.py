"""What backends do with tensors around a kernel: layout of its operands, memory for its results."""

import torch
from torch import Tensor


def last_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy of which that is true."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """Contiguous, not filled, of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def zeros_like(x: Tensor) -> Tensor:
    """Contiguous zeros of x's shape, dtype and device."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def wide_dtype(x: Tensor) -> torch.dtype:
    """dtype of statistics (rstd, log-sum-exp, logprob): fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
