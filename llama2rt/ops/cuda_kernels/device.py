"""Where CUDA kernels run, and what every call of one needs."""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor


class Device(Protocol):
    native: ModuleType
    """The module whose functions launch the kernels."""

    def stream(self, x: Tensor) -> tuple[int, int]:
        """(device index, handle of its current stream), where x lies."""

    def multiprocessors(self, x: Tensor) -> int:
        """How many the device of x has."""

    def cache_bytes(self, x: Tensor) -> int:
        """Size of the cache that all of them share (L2)."""


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) with the same scaled scores and a scale above 0.

    Kernels scale the maximum of a row's scores, which another scale would make its minimum.
    """
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
