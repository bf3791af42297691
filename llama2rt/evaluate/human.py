"""What people said of versions on the 7-point scale (Llama 2, appendix A.3.7): wins, ties and
losses, and how far the raters agree, by pair of versions."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from llama2rt.evaluate.agreement import Agreement, gwet

POINTS = 7
"""from the first much better, a score of 3, to the second much better, -3"""


@dataclass(frozen=True)
class Judged:
    """One rater's score of one pair of answers."""

    versions: tuple[str, str]
    item: Hashable
    """the pair of answers"""
    rater: str
    score: int
    """3 to -3, above 0 where the first version's answer is better"""


def by_versions(judged: Iterable[Judged]) -> dict[tuple[str, str], list[Judged]]:
    """The judgements of every two versions, in order."""
    found: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for one in judged:
        found[one.versions].append(one)
    return dict(found)


def points(judged: Iterable[Judged]) -> dict[Hashable, float]:
    """One outcome a pair of answers: the median of its raters. The paper does not say how three
    raters become one."""
    scores: dict[Hashable, list[int]] = defaultdict(list)
    for one in judged:
        scores[one.item].append(one.score)
    return {item: median(found) for item, found in scores.items()}


def agreement(judged: Iterable[Judged]) -> Mapping[str, tuple[Agreement, int]]:
    """AC1 and AC2 (ordinal weights) on the 7 points, each with how many items two or more have
    rated; empty where none has two ratings."""
    rows = list(judged)
    raters = {name: i for i, name in enumerate(sorted({one.rater for one in rows}))}
    items: dict[Hashable, np.ndarray] = {}
    for one in rows:
        item = items.setdefault(one.item, np.full(len(raters), np.nan))
        item[raters[one.rater]] = 3 - one.score
    several = sum(int((~np.isnan(item)).sum() >= 2) for item in items.values())
    if not several:
        return {}
    table = list(items.values())
    return {
        "AC1": (gwet(table, categories=POINTS), several),
        "AC2": (gwet(table, categories=POINTS, weights="ordinal"), several),
    }
