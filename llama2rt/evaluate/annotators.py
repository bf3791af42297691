"""How far annotators agree on which of two answers is better, by how sure they were.

A reward model cannot rank pairs better than people agree on them, so these shares stand beside its
accuracy by rating. Pairs count that several raters judged: rows that name their rater, or hold
votes (`data.votes`). Llama 2 does not print these for its comparisons; section 3.4 does for its
human evaluation, with Gwet's coefficients.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama2rt.data.records import RATINGS, Comparison, Votes
from llama2rt.data.votes import gather, vote_table
from llama2rt.evaluate.agreement import gwet
from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.preference import AVERAGE, UNRATED


def agreement(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """Of pairs with several votes: `pairs`, how many; `by_rating`, rows {rating, mean, low, high,
    pairs, votes} with the share of the other votes on a pair that say what a vote of that rating
    says, and over all; `ac1`, Gwet's coefficient of the choice, and, where a pair has two rated
    votes, `ac2` with ordinal weights on the scale that choice and rating make, each {coefficient,
    low, high}. Intervals are over pairs. None where no pair has several votes."""
    several = [pair for pair in gather(comparisons) if len(pair.votes) > 1]
    if not several:
        return None
    found = {"pairs": len(several), "by_rating": _by_rating([pair.votes for pair in several])}
    for name, rated, weights in (("ac1", False, "nominal"), ("ac2", True, "ordinal")):
        table, categories = vote_table(several, rated)
        if (np.isfinite(table).sum(axis=1) > 1).any():
            of = gwet(table, categories=categories, weights=weights)
            found[name] = {"coefficient": of.coefficient, "low": of.low, "high": of.high}
    return found


def _by_rating(judged: Sequence[Votes]) -> list[dict[str, Any]]:
    agreeing: dict[str, list[list[float]]] = {}
    for votes in judged:
        of_pair: dict[str, list[float]] = {}
        said = [vote["prefers"] for vote in votes]
        for vote in votes:
            share = (said.count(vote["prefers"]) - 1) / (len(said) - 1)
            of_pair.setdefault(vote.get("rating", UNRATED), []).append(share)
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
