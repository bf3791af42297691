"""Packed batches: documents end to end in one row of tokens, no padding anywhere.

`Batch` is what every training objective receives; `PairBatch` is the same with chosen and
rejected documents side by side. Packing never splits and never truncates an example, because a
shortened answer would teach the model to stop short; one that is longer than a micro-batch is one
of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from llama2rt.model.shared_prefix import SharedKeys
from llama2rt.model.tails import Tails

UNREAD = 0.1
"""least share of a batch's tokens that is worth leaving out of the last block"""


class Example(NamedTuple):
    """One document of n tokens."""

    tokens: np.ndarray
    """int32 [n]"""
    trainable: np.ndarray
    """bool [n], True where the model should learn to predict that token"""

    @classmethod
    def of(cls, tokens: ArrayLike, trainable: ArrayLike | None = None) -> "Example":
        """From lists, such as the two `text.chat.encode_dialogue` returns; everything is
        trainable by default."""
        array = np.asarray(tokens, dtype=np.int32)
        if trainable is None:
            return cls(array, np.ones(len(array), dtype=np.bool_))
        mask = np.asarray(trainable, dtype=np.bool_)
        if mask.shape != array.shape:
            raise ValueError(f"trainable: expected shape {array.shape}, got {mask.shape}")
        return cls(array, mask)


@dataclass(frozen=True)
class Batch:
    """B documents of T tokens together, end to end."""

    tokens: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int32 [T], from 0 in each document"""
    cu_seqlens: torch.Tensor
    """int32 [B+1], where the documents begin and end"""
    targets: torch.Tensor
    """int64 [T]: the document's next token where that is trainable, else -1"""
    weight: int
    """number of targets >= 0, counted on the CPU, so that nothing waits for the device"""
    keys: SharedKeys | None = None
    """what the documents attend to where they share tokens (`data.shared`): the tokens and
    `cu_seqlens` are then those that a document has for itself, and positions go on behind what it
    shares. None where each document is whole"""
    tails: Tails | None = None
    """the documents' ends from their first target on, or, of `at_ends`, their last tokens: nothing
    else is read of them. None where that is nearly all"""

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            keys=None if self.keys is None else self.keys.to(device),
            tails=None if self.tails is None else self.tails.to(device),
        )

    @property
    def documents(self) -> int:
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class PairBatch:
    """n pairs."""

    batch: Batch
    """2n documents: chosen 0, rejected 0, chosen 1, ..."""
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """[n] each, one value a pair (margins, ratings, reference log-probabilities)"""
    filler: bool = False
    """whether this only keeps a rank busy (`filler_pairs`)"""

    @property
    def weight(self) -> int:
        """n, or 0 of a filler"""
        return 0 if self.filler else self.batch.documents // 2

    def to(self, device: torch.device | str) -> "PairBatch":
        moved = {name: value.to(device, non_blocking=True) for name, value in self.extras.items()}
        return replace(self, batch=self.batch.to(device), extras=moved)


def pack(examples: Sequence[Example]) -> Batch:
    """One batch of `examples` in their order; empty documents are legal, no documents are not."""
    if not examples:
        raise ValueError("examples: expected at least one")
    tokens = np.concatenate([example.tokens for example in examples])
    trainable = np.concatenate([example.trainable for example in examples])
    lengths = np.fromiter((len(example.tokens) for example in examples), np.int64, len(examples))
    targets = np.full(len(tokens), -1, dtype=np.int64)
    targets[:-1] = np.where(trainable[1:], tokens[1:], -1)
    targets[np.cumsum(lengths)[lengths > 0] - 1] = -1
    return pack_arrays(tokens, targets, lengths)


def at_ends(packed: Callable[[Sequence[Example]], Batch]) -> Callable[[Sequence[Example]], Batch]:
    """`packed`, where only the last token of each document is read, none of which is empty."""

    def pack_to_the_ends(examples: Sequence[Example]) -> Batch:
        batch = packed(examples)
        return replace(batch, tails=Tails.of_last_tokens(batch.cu_seqlens))

    return pack_to_the_ends


def pack_arrays(tokens: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> Batch:
    """The batch of documents that lie end to end already: `tokens` and `targets` [T] and the
    documents' `lengths` [B], which add up to T."""
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    predicting = targets >= 0
    return Batch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        targets=torch.from_numpy(targets.astype(np.int64, copy=False)),
        weight=int(np.count_nonzero(predicting)),
        tails=tails(predicting, cu_seqlens),
    )


def tails(predicting: np.ndarray, cu_seqlens: np.ndarray) -> Tails | None:
    """Of each document the tokens from the first one on that predicts something, where that leaves
    out at least `UNREAD` of all; `predicting` bool [T], `cu_seqlens` int32 [B+1]."""
    count, least = len(predicting), UNREAD * len(predicting)
    if count - np.count_nonzero(predicting) < least:
        return None
    backwards = np.flatnonzero(predicting)[::-1]
    ends = cu_seqlens[1:].astype(np.int64)
    begins = ends.copy()
    # A document's first is written last.
    begins[np.searchsorted(ends, backwards, side="right")] = backwards
    offsets = np.zeros(len(cu_seqlens), np.int32)
    np.cumsum(ends - begins, out=offsets[1:])
    if offsets[-1] == 0 or count - offsets[-1] < least:
        return None
    rows = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], ends - begins)
    return Tails(torch.from_numpy(rows), torch.from_numpy(offsets))


def pack_pairs(
    pairs: Sequence[tuple[Example, Example]],
    extras: Mapping[str, ArrayLike] | None = None,
    packed: Callable[[Sequence[Example]], Batch] = pack,
) -> PairBatch:
    """One batch of (chosen, rejected) `pairs`; each of `extras` holds one number a pair and
    becomes a tensor (floating point as fp32)."""
    values: dict[str, torch.Tensor] = {}
    for name, value in (extras or {}).items():
        tensor = torch.as_tensor(np.asarray(value))
        if tensor.shape[:1] != (len(pairs),):
            raise ValueError(f"extras[{name!r}]: expected {len(pairs)} rows, got {tensor.shape}")
        values[name] = tensor.float() if tensor.is_floating_point() else tensor
    return PairBatch(packed([example for pair in pairs for example in pair]), values)


def filler() -> Batch:
    """One token and nothing to predict: the micro-batch of a rank that has none left while others
    do, so that all take part in the same collectives."""
    return pack([Example.of([0])])


def filler_pairs(extras: Mapping[str, ArrayLike]) -> PairBatch:
    """What `filler` is for pairs, with the extras of `PairBatch` (any values of theirs). Its loss
    is finite, as both sides predict a token, and whoever sums losses leaves it out."""
    side = Example.of([0, 0])
    zeros = {name: np.zeros_like(np.asarray(value)[:1]) for name, value in extras.items()}
    return replace(pack_pairs([(side, side)], zeros), filler=True)


def groups(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Consecutive runs of indices whose `lengths` add up to at most `max_tokens` each: greedy,
    order kept. A single one that is longer is a group of its own, here and so everywhere: what a
    model can read is bounded by its context, and refusing a response would come after the hours in
    which it was sampled."""
    result: list[range] = []
    begin = total = 0
    for index, length in enumerate(lengths):
        if total + length > max_tokens and index > begin:
            result.append(range(begin, index))
            begin, total = index, 0
        total += length
    if len(lengths) > begin:
        result.append(range(begin, len(lengths)))
    return result


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in as few bins of at most `capacity` as best fit, longest first, finds:
    each goes where it leaves the least (Ding et al. 2024, arXiv 2404.10830, section 3.2, pack
    documents so). Equal lengths keep their order. A longer one is a bin of its own."""
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by what is free in them
    free = 0  # bit i: whether there is a bin in which i is free
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            bins.append([index])
            continue
        fitting = free >> length
        if fitting:
            left = (fitting & -fitting).bit_length() - 1 + length
            number = open_bins[left].pop()
            if not open_bins[left]:
                free ^= 1 << left
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        open_bins[left - length].append(number)
        free |= 1 << (left - length)
    return bins


def micro_batches(
    examples: Sequence[Example],
    max_tokens: int,
    packed: Callable[[Sequence[Example]], Batch] = pack,
) -> list[Batch]:
    """`examples` packed in order into batches as `groups` says; none is split. Tokens that
    `packed` lets documents share count in each of them: a batch holds the same documents, in less
    memory."""
    lengths = [len(example.tokens) for example in examples]
    return [packed([examples[i] for i in group]) for group in groups(lengths, max_tokens)]
