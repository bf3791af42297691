"""What a training set is made of: how many records of each source, and what became of the others.

A share is of the whole training set. It is honoured exactly (to the nearest record) or refused: a
source that holds too few is an error which names the largest share that it can fill, because a mix
that silently is another one makes two runs incomparable. What is drawn depends on the seed, on the
pool's place among the pools and on what it holds.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from llama2rt.data.removed import Removed
from llama2rt.data.sources import MixSource, Source
from llama2rt.errors import InputError

Record = TypeVar("Record")


@dataclass(frozen=True)
class Pool:
    """Sources that are drawn from as if they were one file."""

    name: str
    share: float
    members: tuple[int, ...]
    """their indices in the list of sources"""


def pools(sources: Sequence[MixSource]) -> list[Pool]:
    """The pools of `sources`; one with a share and no pool is a pool of its own. ValueError for
    shares that contradict each other, or that do not leave anything to, or need, sources without
    one."""
    members: dict[Hashable, list[int]] = {}
    for index, source in enumerate(sources):
        if source.pool is not None and source.share is None:
            raise ValueError(f"pool of {source}: give the pool's share beside it")
        if source.share is not None:
            members.setdefault(index if source.pool is None else source.pool, []).append(index)
    found = []
    for name, indices in members.items():
        shares = {sources[i].share for i in indices}
        if len(shares) > 1:
            said = ", ".join(f"{share:g}" for share in sorted(filter(None, shares)))
            raise ValueError(f"pool {name}: its sources give different shares, {said}")
        share = next(filter(None, shares))
        found.append(
            Pool(name if isinstance(name, str) else f"{sources[indices[0]]}", share, (*indices,))
        )
    total = sum(pool.share for pool in found)
    if len(found) and all(source.share is not None for source in sources):
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"shares add up to {total:g}, and no source is without one: expected 1"
            )
    elif total >= 1:
        raise ValueError(f"shares add up to {total:g} and leave nothing to the other sources")
    return found


def wanted(found: Sequence[Pool], held: Sequence[int], whole: int) -> list[int]:
    """How many records of each pool, which hold `held`, make up its share beside `whole` records
    of sources without a share; where there are none, the most that all pools can fill. InputError
    for a pool that holds too few."""
    rest = 1 - sum(pool.share for pool in found)
    if rest < 1e-6:
        total = min(n / pool.share for pool, n in zip(found, held, strict=True))
    else:
        total = whole / rest
    counts = []
    for pool, n in zip(found, held, strict=True):
        count = round(pool.share * total)
        if count > n:
            most = n * (rest + pool.share) / (whole + n)
            raise InputError(
                f"sources: {pool.name} holds {n:,} records, and a share of {pool.share:g} needs "
                f"{count:,}; at most {math.floor(most * 1e4) / 1e4:g} can be filled"
            )
        if count == 0:
            raise InputError(f"sources: {pool.name}: a share of {pool.share:g} is not one record")
        counts.append(count)
    return counts


def draw(held: int, count: int, seed: int, pool: int) -> list[int]:
    """`count` of the indices below `held`, in order, drawn for the pool of that number."""
    return sorted(np.random.default_rng([seed, pool]).permutation(held)[:count].tolist())


def mix(
    sources: Sequence[MixSource],
    records: Sequence[Sequence[Record]],
    seed: int,
    account: "Account",
) -> list[Record]:
    """All of the `records` of those of `sources` that have no share, and behind them what is drawn
    from each pool. InputError where a pool cannot fill its share."""
    found = pools(sources)
    chosen = [
        r
        for s, of_source in zip(sources, records, strict=True)
        if s.share is None
        for r in of_source
    ]
    of_pools = [[r for i in pool.members for r in records[i]] for pool in found]
    counts = wanted(found, list(map(len, of_pools)), len(chosen))
    for index, (held, count) in enumerate(zip(of_pools, counts, strict=True)):
        taken = draw(len(held), count, seed, index)
        chosen += [held[i] for i in taken]
        others = set(range(len(held))).difference(taken)
        account.leave_out("not drawn", (held[i] for i in others))
    return chosen


@dataclass
class Ingredient:
    """One source of a training set."""

    key: str
    """of the recipe"""
    source: Source
    read: int = 0
    """records that it gave"""
    left_out: Counter[str] = field(default_factory=Counter)
    """those that did not go in, by reason"""
    used: int = 0

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        said = self.source.model_dump(mode="json")
        said = {"path": said} if isinstance(said, str) else said
        counts = {"read": self.read, "left_out": dict(self.left_out), "used": self.used}
        return {"key": self.key, **said, **counts}


class Account:
    """What became of every record of a run's sources."""

    def __init__(self) -> None:
        self.ingredients: list[Ingredient] = []
        self.removed = Removed()
        """by filters"""
        self._of: dict[int, Ingredient] = {}

    def add(self, key: str, source: Source, records: Iterable[Any], removed: int = 0) -> None:
        """A source and the records that its file gave, beside those that filters of rows removed.
        Records are told apart by identity: they must stay alive as long as they are accounted for.
        """
        ingredient = Ingredient(key, source)
        self.ingredients.append(ingredient)
        for record in records:
            self._of[id(record)] = ingredient
            ingredient.read += 1
        self._count(ingredient, "filtered", removed)
        ingredient.read += removed

    def leave_out(self, reason: str, records: Iterable[Any]) -> None:
        """Records that do not go in."""
        for record in records:
            self._count(self._of[id(record)], reason, 1)

    def use(self, records: Iterable[Any]) -> None:
        """Those that go in; no record can be asked for any more."""
        for record in records:
            self._of[id(record)].used += 1
        self._of.clear()

    @staticmethod
    def _count(ingredient: Ingredient, reason: str, count: int) -> None:
        if count:
            ingredient.left_out[reason] += count

    def report(self) -> dict[str, Any]:
        """{"composition": a list of what went in by source, "filters": what they removed}, for the
        manifest; empty where nothing was read."""
        if not self.ingredients:
            return {}
        filtered = {"filters": self.removed.report()} if self.removed.active else {}
        return {"composition": [i.as_json() for i in self.ingredients], **filtered}

    def lines(self) -> list[str]:
        """The same for people."""
        total = sum(ingredient.used for ingredient in self.ingredients)
        found = []
        for one in self.ingredients:
            text = f"{one.key}: {one.used:,} of {one.read:,} records of {one.source}"
            if one.used:
                text += f", {one.used / total:.1%} of what is trained on"
            if one.left_out:
                text += f" ({', '.join(f'{n:,} {reason}' for reason, n in one.left_out.items())})"
            found.append(text)
        return [*found, *self.removed.lines()]


def declared(sources: Sequence[MixSource]) -> list[str]:
    """A mix as its recipe says it, for a dry run that reads no file."""
    found = []
    for index, source in enumerate(sources):
        pool = f" of pool {source.pool}" if source.pool is not None else ""
        part = "all of" if source.share is None else f"a share of {source.share:g}{pool} from"
        found.append(f"sources.{index}: {part} {source}")
    return found
