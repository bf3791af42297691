"""How far annotators agree on which of two answers is better, by how sure they were.

A reward model cannot rank pairs better than people agree on them, so these shares stand beside its
accuracy by rating. Pairs that were judged more than once are found by their text: the same prompt
with the same two answers, whichever was chosen. Llama 2 does not print these for its comparisons;
section 3.4 does for its human evaluation, with Gwet's coefficients.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama2rt.data.records import RATINGS, Comparison
from llama2rt.evaluate.agreement import gwet
from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.preference import AVERAGE, UNRATED


def agreement(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """Of pairs judged more than once: `by_rating`, rows {rating, mean, low, high, pairs, votes}
    with the share of the other votes on a pair that agree with a vote of that rating, and over all;
    `ac1`, Gwet's coefficient of the choice, and, where every vote is rated, `ac2` with ordinal
    weights on the scale of eight that choice and rating make, each {coefficient, low, high}.
    Intervals are over pairs. None where no pair was judged twice.
    """
    judged: dict[tuple[str, frozenset[str]], list[Comparison]] = {}
    for comparison in comparisons:
        answers = frozenset((comparison.chosen.strip(), comparison.rejected.strip()))
        judged.setdefault((repr(comparison.prompt), answers), []).append(comparison)
    several = [votes for votes in judged.values() if len(votes) > 1]
    if not several:
        return None
    found: dict[str, Any] = {"pairs": len(several), "by_rating": _by_rating(several)}
    # Which answer counts as the first must not depend on the votes.
    raters = max(map(len, several))
    choice = np.full((len(several), raters), np.nan)
    scale = np.full((len(several), raters), np.nan)
    for i, votes in enumerate(several):
        first = min(votes[0].chosen.strip(), votes[0].rejected.strip())
        for j, vote in enumerate(votes):
            is_first = vote.chosen.strip() == first
            choice[i, j] = not is_first
            if vote.rating is not None:
                rank = RATINGS.index(vote.rating)
                scale[i, j] = rank if is_first else 2 * len(RATINGS) - 1 - rank
    found["ac1"] = _coefficient(choice, 2, "nominal")
    if np.isnan(scale).sum() == np.isnan(choice).sum():
        found["ac2"] = _coefficient(scale, 2 * len(RATINGS), "ordinal")
    return found


def _coefficient(ratings: np.ndarray, categories: int, weights: str) -> dict[str, float]:
    found = gwet(ratings, categories=categories, weights=weights)
    return {"coefficient": found.coefficient, "low": found.low, "high": found.high}


def _by_rating(judged: Sequence[Sequence[Comparison]]) -> list[dict[str, Any]]:
    agreeing: dict[str, list[list[float]]] = {}
    for votes in judged:
        of_pair: dict[str, list[float]] = {}
        for i, vote in enumerate(votes):
            others = [other.chosen.strip() for j, other in enumerate(votes) if j != i]
            share = sum(chosen == vote.chosen.strip() for chosen in others) / len(others)
            of_pair.setdefault(vote.rating or UNRATED, []).append(share)
            of_pair.setdefault(AVERAGE, []).append(share)
        for rating, shares in of_pair.items():
            agreeing.setdefault(rating, []).append(shares)
    rows = []
    for rating in (*RATINGS, UNRATED, AVERAGE):
        if by_pair := agreeing.get(rating):
            means = [float(np.mean(shares)) for shares in by_pair]
            rows.append(
                {
                    "rating": rating,
                    **wilson(sum(means), len(means))._asdict(),
                    "pairs": len(means),
                    "votes": sum(map(len, by_pair)),
                }
            )
    return rows
