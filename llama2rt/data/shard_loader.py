"""The loader of token shards: a weighted mix of sources in an order that is computed, not stored.

`loader.TokenLoader` shuffles a table of an epoch's windows, which text that was tokenised in one go
can afford. Here a window's source, shard and place follow from its number by arithmetic, so that
memory does not grow with the sources, and a run resumes anywhere at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from llama2rt.data.loader import WHOLE, Share, _Loader
from llama2rt.data.order import Permutation, mixed, round_keys
from llama2rt.data.packing import Batch, filler
from llama2rt.data.shards import Shards
from llama2rt.data.tokens import pack_groups, shares
from llama2rt.errors import InputError

# What a key is for, so that no two orders are drawn from one.
_MIXTURE, _WINDOWS, _OFFSETS = 1, 2, 3


class WeightedShards(NamedTuple):
    """A source of a mix."""

    name: str
    shards: Shards
    weight: float | None
    """of its tokens beside the others' weights; None on every source for all that each holds"""


@dataclass(frozen=True)
class SourceBatch(Batch):
    """A batch whose tokens come from several sources."""

    sources: torch.Tensor | None = None
    """int32 [T]: the source of each token, by its number"""

    def to(self, device: torch.device | str) -> "SourceBatch":
        moved = super().to(device)
        assert isinstance(moved, SourceBatch) and self.sources is not None
        return replace(moved, sources=self.sources.to(device, non_blocking=True))


class ShardLoader(_Loader[SourceBatch]):
    """Windows of `context` tokens of several sources, about `batch_tokens` tokens a step (a whole
    number of windows) in micro-batches of at most `micro_tokens`.

    A shard is read as a ring and cut into windows, from an offset that differs each time through
    its source, and all windows of a source come once before any comes again, in random order: one
    pass predicts every token once. What a document sees is as of `TokenLoader`. An epoch has as
    many windows as all sources together; of them each source has its weight's part, measured in
    tokens, and continues where the epoch before left it.
    """

    def __init__(
        self,
        sources: Sequence[WeightedShards],
        context: int,
        batch_tokens: int,
        micro_tokens: int,
        seed: int,
        epochs: int | None = None,
        *,
        share: Share = WHOLE,
    ) -> None:
        if context < 1 or batch_tokens < context or micro_tokens < context:
            raise InputError(
                f"batch_tokens {batch_tokens} and micro_tokens {micro_tokens} must both hold at "
                f"least one window of context {context}"
            )
        self._sources = list(sources)
        self._context, self._micro_windows = context, micro_tokens // context
        self._rings = [np.array(one.shards.lengths, np.int64) - 1 for one in self._sources]
        # Of each source where the windows of its shards end, in windows from its first on.
        self._ends = [np.cumsum(-(-rings // context)) for rings in self._rings]
        self.windows = [int(ends[-1]) if len(ends) else 0 for ends in self._ends]
        """of each source, in one pass"""
        for one, held in zip(self._sources, self.windows, strict=True):
            if not held:
                raise InputError(f"sources: {one.name}: holds no text to train on")
        self.draws = self._drawn()
        """windows of each source in an epoch"""
        super().__init__(sum(self.draws), batch_tokens // context, seed, epochs, share)

    def _drawn(self) -> list[int]:
        weights = [one.weight for one in self._sources]
        if all(weight is None for weight in weights):
            return list(self.windows)
        # The last window of a shard is short: weights are of tokens, not of windows.
        of_a_window = [
            weight * held / int(rings.sum())
            for weight, held, rings in zip(
                [weight or 0.0 for weight in weights], self.windows, self._rings, strict=True
            )
        ]
        draws = shares(self.windows, of_a_window)
        for one, count in zip(self._sources, draws, strict=True):
            if not count:
                raise InputError(
                    f"sources: {one.name}: a weight of {one.weight:g} is not one of an epoch's "
                    f"{sum(draws)} windows of {self._context} tokens"
                )
        return draws

    def passes(self, steps: int) -> list[float]:
        """How many times `steps` steps go through each source, about."""
        drawn = steps * self._batch_size / self._size
        return [drawn * d / held for d, held in zip(self.draws, self.windows, strict=True)]

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {
            "context": self._context,
            "draws": self.draws,
            "sources": [one.shards.digest for one in self._sources],
        }

    def _start_epoch(self) -> "_Epoch":
        return _Epoch(self, self._epoch)

    def rows(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """int64 [k, 4]: (source, shard, first token, length) of the windows `begin` to `end` of an
        epoch."""
        order = Permutation(self._size, (_MIXTURE, self._seed, epoch, 0))
        place = order(np.arange(begin, min(end, self._size)))
        edges = np.cumsum(self.draws)
        source = np.searchsorted(edges, place, side="right")
        rows = np.empty((len(place), 4), np.int64)
        for index in np.unique(source).tolist():
            own = np.flatnonzero(source == index)
            draws = self.draws[index]
            number = place[own] - (edges[index] - draws) + epoch * draws
            rows[own] = self._windows_of(index, number)
        return rows

    def _windows_of(self, source: int, number: np.ndarray) -> np.ndarray:
        """int64 [k, 4]: rows of the windows that a source gives as its `number`-th of a run."""
        turns, place = np.divmod(number, self.windows[source])
        rings, ends = self._rings[source], self._ends[source]
        rows = np.empty((len(number), 4), np.int64)
        for turn in np.unique(turns).tolist():
            own = np.flatnonzero(turns == turn)
            order = Permutation(self.windows[source], (_WINDOWS, self._seed, source, turn))
            window = order(place[own])
            shard = np.searchsorted(ends, window, side="right")
            ring = rings[shard]
            # In whole windows from the shard's own first one on.
            before = ends[shard] - -(-ring // self._context)
            at = (window - before) * self._context
            [key] = round_keys((_OFFSETS, self._seed, source, turn), 1)
            offset = mixed(mixed(shard.astype(np.uint64) + key)) % ring.astype(np.uint64)
            first = (offset.astype(np.int64) + at) % ring
            length = np.minimum(self._context, ring - at)
            rows[own] = np.stack([np.full_like(shard, source), shard, first, length], axis=1)
        return rows

    def _assemble(self, indices: np.ndarray) -> list[SourceBatch]:
        rank, ranks = self._share
        own = indices[rank::ranks]
        windows = [
            (self._sources[source].shards.stream(shard), first, length)
            for source, shard, first, length in own.tolist()
        ]
        each = range(0, len(own), self._micro_windows)
        packed = pack_groups([windows[at : at + self._micro_windows] for at in each])
        sources = torch.from_numpy(np.repeat(own[:, 0].astype(np.int32), own[:, 3]))
        sizes = [len(batch.tokens) for batch in packed]
        result = [
            _of_sources(batch, part)
            for batch, part in zip(packed, sources.split(sizes), strict=True)
        ]
        # Rank 0 has as many windows as any.
        most = -(-len(indices[::ranks]) // self._micro_windows)
        nothing = _of_sources(filler(), torch.zeros(1, dtype=torch.int32))
        return result + [nothing] * (most - len(result))


class _Epoch:
    """An epoch's windows as if they stood in a table."""

    def __init__(self, loader: ShardLoader, epoch: int) -> None:
        self._loader, self._epoch = loader, epoch

    def __len__(self) -> int:
        return sum(self._loader.draws)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._loader.rows(self._epoch, part.start, part.stop)


def _of_sources(batch: Batch, sources: torch.Tensor) -> SourceBatch:
    packed = batch.tokens, batch.positions, batch.cu_seqlens, batch.targets
    return SourceBatch(*packed, batch.weight, sources=sources)
