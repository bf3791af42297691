"""Deterministic loaders that resume at any step, to the bit, across epoch boundaries too.

A loader's whole state is (epoch, position in the epoch). The order of an epoch is a permutation
that depends on (seed, epoch) alone, so that it is computed again on resume, never stored. Every
epoch has every example once; its last step may be smaller. `next()` returns the micro-batches of
one optimizer step. There are no worker processes, since packing takes far less time than a step.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.data.groups import Group, GroupBatch, filler_groups, pack_groups
from llama2rt.data.packing import (
    Batch,
    Example,
    PairBatch,
    best_fit,
    filler,
    filler_pairs,
    groups,
    pack,
    pack_pairs,
)
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError

logger = logging.getLogger("llama2rt.data.loader")

Step = TypeVar("Step")
Item = TypeVar("Item")


Share = tuple[int, int]
"""(rank, ranks): which of how many processes that divide each step among them this one is"""
WHOLE: Share = (0, 1)


def balanced(lengths: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of `lengths` divided among `ranks` processes, each one's in ascending order: the
    longest first, always to the one with the fewest tokens so far (Graham 1969)."""
    parts: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0.0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(ranks), key=tokens.__getitem__)
        parts[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(part) for part in parts]


def dealt(items: Iterable[Item], share: Share, rest: Item) -> Iterator[Item]:
    """Every `ranks`-th of `items` in turn, and `rest` where other ranks have one more: as many on
    each."""
    rank, ranks = share
    remaining = iter(items)
    while turn := list(islice(remaining, ranks)):
        yield turn[rank] if rank < len(turn) else rest


def shared_groups(
    lengths: Sequence[int], max_tokens: int, share: Share
) -> tuple[list[list[int]], int]:
    """(the micro-batches of one process of `share`, as indices of `lengths`; how many of the same
    count as all others it has to add to them). Of one process: `packing.groups`."""
    rank, ranks = share
    if ranks == 1:
        return [list(group) for group in groups(lengths, max_tokens)], 0
    divided = [
        [[part[i] for i in group] for group in groups([lengths[i] for i in part], max_tokens)]
        for part in balanced(lengths, ranks)
    ]
    return divided[rank], max(map(len, divided)) - len(divided[rank])


class Order(Protocol):
    """The items of an epoch: a table, or what can compute any part of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


class _Loader(Generic[Step]):
    """Order, epochs and resumption of `size` items, `batch_size` a step, divided among processes.

    A step is the same items whatever the number of processes, so that a run goes on with the same
    data on another one. All have the same number of micro-batches, with fillers where they lack
    some.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, epochs: int | None, share: Share = WHOLE
    ) -> None:
        if size < 1:
            raise InputError("the loader has no examples")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs: expected at least 1 or None, got {epochs}")
        self._size, self._batch_size = size, batch_size
        self._seed, self._epochs, self._share = seed, epochs, share
        self._epoch, self._position = 0, 0
        self._order: Order | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._size // self._batch_size)

    def _assemble(self, indices: np.ndarray) -> list[Step]:
        """This process's micro-batches of the items `indices`."""
        raise NotImplementedError

    def _start_epoch(self) -> Order:
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._size)

    def next(self) -> list[Step]:
        """Micro-batches of the next optimizer step; StopIteration after the last epoch."""
        if self._order is not None and self._position >= len(self._order):
            self._epoch, self._position, self._order = self._epoch + 1, 0, None
        if self._epochs is not None and self._epoch >= self._epochs:
            raise StopIteration
        if self._order is None:
            self._order = self._start_epoch()
            if self._position >= len(self._order):  # resumed exactly at the end of an epoch
                return self.next()
        indices = self._order[self._position : self._position + self._batch_size]
        self._position += len(indices)
        return self._assemble(indices)

    def __iter__(self) -> Iterator[list[Step]]:
        return self

    __next__ = next

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the next step begins, and what it depends on."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. InputError when the data, seed or batch size are
        not those of the saved run, because the sequence would silently differ."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise InputError(f"cannot resume: {key} was {state.get(key)}, is {value} now")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = None

    def _identity(self) -> dict[str, Any]:
        return {"size": self._size, "batch_size": self._batch_size, "seed": self._seed}


def _fingerprint(examples: Sequence[Example]) -> int:
    """Changes when any token or mask does, so that a run that is resumed on other data fails."""
    value = 0
    for example in examples:
        value = zlib.crc32(example.trainable.tobytes(), zlib.crc32(example.tokens.tobytes(), value))
    return value


def _warn_of_long(what: str, lengths: Sequence[int], micro_tokens: int) -> None:
    """Say what will take more memory than `micro_tokens` promises, before the first step."""
    if longer := sum(length > micro_tokens for length in lengths):
        logger.warning(
            "%d %s longer than micro_tokens, %d, pass alone; the longest has %d tokens",
            longer,
            what,
            micro_tokens,
            max(lengths),
        )


class ExampleLoader(_Loader[Batch]):
    """Steps of `batch_size` examples in micro-batches of at most `micro_tokens` tokens, for
    `epochs` epochs (None: for ever). A longer example passes alone, and is said. Of several
    processes each has about as many tokens."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        micro_tokens: int,
        seed: int,
        epochs: int | None = None,
        *,
        share: Share = WHOLE,
    ) -> None:
        super().__init__(len(examples), batch_size, seed, epochs, share)
        self._examples, self._micro_tokens = examples, micro_tokens
        self._fingerprint = _fingerprint(examples)
        _warn_of_long("examples", [len(example.tokens) for example in examples], micro_tokens)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"content": self._fingerprint}

    def _assemble(self, indices: np.ndarray) -> list[Batch]:
        examples = [self._examples[i] for i in indices]
        lengths = [len(example.tokens) for example in examples]
        members, missing = shared_groups(lengths, self._micro_tokens, self._share)
        packed = [pack([examples[i] for i in group]) for group in members]
        return packed + [filler()] * missing


class BlockLoader(_Loader[Batch]):
    """Steps of `batch_size` blocks: examples put together, in an order drawn from `seed`, until the
    next one would go beyond `block_tokens`. Which examples share a step is all that a block
    decides, as documents never see each other; what passes at once are micro-batches of at most
    `micro_tokens` tokens. With `full`, blocks are filled as far as `packing.best_fit` can. Epochs,
    and several processes, as of `ExampleLoader`."""

    def __init__(
        self,
        examples: Sequence[Example],
        block_tokens: int,
        batch_size: int,
        micro_tokens: int,
        seed: int,
        *,
        share: Share = WHOLE,
        full: bool = False,
    ) -> None:
        lengths = [len(example.tokens) for example in examples]
        self._blocks = blocks(lengths, block_tokens, seed, full)
        super().__init__(len(self._blocks), batch_size, seed, None, share)
        self._examples, self._micro_tokens = examples, micro_tokens
        self._content = {"block_tokens": block_tokens, "content": _fingerprint(examples)}
        self._content |= {"full": 1} if full else {}
        _warn_of_long("examples", lengths, micro_tokens)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | self._content

    def _assemble(self, indices: np.ndarray) -> list[Batch]:
        examples = [self._examples[i] for block in indices for i in self._blocks[block]]
        lengths = [len(example.tokens) for example in examples]
        members, missing = shared_groups(lengths, self._micro_tokens, self._share)
        packed = [pack([examples[i] for i in group]) for group in members]
        return packed + [filler()] * missing


def blocks(
    lengths: Sequence[int], block_tokens: int, seed: int, full: bool = False
) -> list[list[int]]:
    """Indices of examples of those `lengths`, as `BlockLoader` puts them into blocks."""
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    put = best_fit if full else groups
    filled = put([lengths[i] for i in order], block_tokens)
    return [[order[i] for i in block] for block in filled]


class PairLoader(_Loader[PairBatch]):
    """Steps of `batch_size` (chosen, rejected) pairs in micro-batches of at most `micro_tokens`
    tokens, both sides counted; each of `extras` holds one number a pair and travels with it. The
    prompt of a pair is in its batch once where `packed` says so (`data.shared`)."""

    def __init__(
        self,
        pairs: Sequence[tuple[Example, Example]],
        extras: Mapping[str, ArrayLike] | None,
        batch_size: int,
        micro_tokens: int,
        seed: int,
        epochs: int | None = None,
        *,
        share: Share = WHOLE,
        packed: Callable[[Sequence[Example]], Batch] = pack_shared,
    ) -> None:
        super().__init__(len(pairs), batch_size, seed, epochs, share)
        self._pairs, self._micro_tokens, self._packed = pairs, micro_tokens, packed
        self._extras = {name: np.asarray(value) for name, value in (extras or {}).items()}
        for name, value in self._extras.items():
            if len(value) != len(pairs):
                raise ValueError(f"extras[{name!r}]: expected {len(pairs)} rows, got {len(value)}")
        self._lengths = np.array([len(a.tokens) + len(b.tokens) for a, b in pairs])
        self._fingerprint = _fingerprint([example for pair in pairs for example in pair])
        _warn_of_long("pairs", self._lengths.tolist(), micro_tokens)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"content": self._fingerprint}

    def _assemble(self, indices: np.ndarray) -> list[PairBatch]:
        result = []
        lengths = self._lengths[indices].tolist()
        shared, missing = shared_groups(lengths, self._micro_tokens, self._share)
        for group in shared:
            members = indices[group]
            extras = {name: value[members] for name, value in self._extras.items()}
            result.append(pack_pairs([self._pairs[i] for i in members], extras, self._packed))
        return result + [filler_pairs(self._extras)] * missing


class GroupLoader(_Loader[GroupBatch]):
    """Steps of `batch_size` groups in micro-batches of at most `micro_tokens` tokens; each of
    `extras` has a number a document. `mismatched`: of each group a document to read beside it."""

    def __init__(
        self,
        groups: Sequence[Group],
        extras: Mapping[str, ArrayLike],
        batch_size: int,
        micro_tokens: int,
        seed: int,
        *,
        mismatched: Sequence[Example] | None = None,
        share: Share = WHOLE,
        packed: Callable[[Sequence[Example]], Batch] = pack_shared,
    ) -> None:
        super().__init__(len(groups), batch_size, seed, None, share)
        self._groups, self._mismatched, self._packed = groups, mismatched, packed
        self._extras = {name: np.asarray(value) for name, value in extras.items()}
        self._micro_tokens = micro_tokens
        self._begins = np.cumsum([0, *(len(group) for group in groups)])
        self._lengths = [sum(len(one.tokens) for one in group) for group in groups]
        self._fingerprint = _fingerprint(list(chain.from_iterable(groups)))
        _warn_of_long("groups", self._lengths, micro_tokens)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"content": self._fingerprint}

    def _assemble(self, indices: np.ndarray) -> list[GroupBatch]:
        lengths = [self._lengths[i] for i in indices]
        members, missing = shared_groups(lengths, self._micro_tokens, self._share)
        packed = [self._packed_groups(indices[group]) for group in members]
        return packed + [filler_groups(self._extras, self._mismatched is not None)] * missing

    def _packed_groups(self, members: np.ndarray) -> GroupBatch:
        rows = np.concatenate([np.arange(self._begins[i], self._begins[i + 1]) for i in members])
        extras = {name: value[rows] for name, value in self._extras.items()}
        beside = self._mismatched and [self._mismatched[i] for i in members]
        return pack_groups([self._groups[i] for i in members], extras, beside, self._packed)
