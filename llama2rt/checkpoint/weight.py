"""Weights that are read when they are needed, whole or in part: of a folder, or of a model.

Whoever writes, converts or fills a model takes one tensor at a time from here, so that a model
larger than the memory passes through; and whoever holds a shard reads the shard.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Area = tuple[slice, ...]
"""part of a tensor: a slice with both ends for each dimension"""


@dataclass(frozen=True)
class Weight:
    """A tensor that is somewhere: `read` fetches it."""

    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[Area], Tensor]
    """the part of it in an area, on any device; perhaps a view of a mapped file"""

    def read(self, area: Area | None = None) -> Tensor:
        """The tensor, or the part of it in `area`, on the CPU."""
        part = self.fetch(tuple(slice(0, n) for n in self.shape) if area is None else area)
        return part.detach().to("cpu", self.dtype)

    def rows(self, rows: int) -> Iterator[Tensor]:
        """The tensor in pieces of so many rows."""
        for begin in range(0, self.shape[0], rows):
            rest = tuple(slice(0, n) for n in self.shape[1:])
            yield self.read((slice(begin, min(begin + rows, self.shape[0])), *rest))

    def to(self, dtype: torch.dtype) -> "Weight":
        return dataclasses.replace(self, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def of_tensor(tensor: Tensor) -> Weight:
    """A weight in memory. One that ranks share is fetched by all of them together, whole."""

    def fetch(area: Area) -> Tensor:
        # A DTensor, without importing what that needs in one process.
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return whole.detach()[area]

    return Weight(tensor.shape, tensor.dtype, fetch)


Stored = tuple[Path, str, Weight]
"""(file, name there, weight)"""
