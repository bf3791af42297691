"""Packed batches of answers that belong together, K of them to a prompt, with numbers for each.

A pair is packed as two sides with one number a pair (`packing.PairBatch`); here any number of
answers of one prompt has a number each, and answers by themselves are groups of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from llama2rt.data.packing import Batch, Example, pack

Group = Sequence[Example]


@dataclass(frozen=True)
class GroupBatch:
    """n groups of B documents together."""

    batch: Batch
    """the documents of group 0, of group 1, ..."""
    sizes: torch.Tensor
    """int64 [n]: documents of each group"""
    extras: Mapping[str, torch.Tensor]
    """[B] each, one value a document"""
    mismatched: Batch | None = None
    """a document of each group that is read without being learned from, n of them"""
    filler: bool = False
    """whether this only keeps a rank busy (`filler_groups`)"""

    @property
    def weight(self) -> int:
        """n, or 0 of a filler"""
        return 0 if self.filler else len(self.sizes)

    def to(self, device: torch.device | str) -> "GroupBatch":
        moved = {name: value.to(device, non_blocking=True) for name, value in self.extras.items()}
        beside = None if self.mismatched is None else self.mismatched.to(device)
        sizes = self.sizes.to(device, non_blocking=True)
        return replace(
            self, batch=self.batch.to(device), sizes=sizes, extras=moved, mismatched=beside
        )


def pack_groups(
    groups: Sequence[Group],
    extras: Mapping[str, ArrayLike],
    mismatched: Sequence[Example] | None = None,
    packed: Callable[[Sequence[Example]], Batch] = pack,
) -> GroupBatch:
    """One batch of `groups`; each of `extras` holds one number a document, and becomes a tensor
    (floating point as fp32)."""
    documents = [example for group in groups for example in group]
    values: dict[str, torch.Tensor] = {}
    for name, value in extras.items():
        tensor = torch.as_tensor(np.asarray(value))
        if tensor.shape != (len(documents),):
            raise ValueError(f"extras[{name!r}]: expected {len(documents)}, got {tensor.shape}")
        values[name] = tensor.float() if tensor.is_floating_point() else tensor
    sizes = torch.tensor([len(group) for group in groups])
    beside = None if mismatched is None else pack(mismatched)
    return GroupBatch(packed(documents), sizes, values, beside)


def filler_groups(extras: Mapping[str, ArrayLike], mismatched: bool) -> GroupBatch:
    """What `packing.filler` is for groups: one of one document, which predicts a token. Its loss is
    finite, and whoever sums losses leaves it out."""
    document = Example.of([0, 0])
    zeros = {name: np.zeros_like(np.asarray(value)[:1]) for name, value in extras.items()}
    beside = [document] if mismatched else None
    return replace(pack_groups([[document]], zeros, beside), filler=True)
