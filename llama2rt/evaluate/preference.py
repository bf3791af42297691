"""Accuracy of a reward model: how often it agrees with the annotators, by how sure they were.

Llama 2 (section 3.2.2, Table 8) judges a reward model by this table. Accuracy rises from
"negligibly better" to "significantly better", because people too disagree on the hard pairs. The
average is over all pairs, so it depends on the mix of ratings in the file.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.data.records import RATINGS
from llama2rt.evaluate.intervals import wilson

UNRATED = "unrated"
AVERAGE = "average"


def accuracy(
    chosen: ArrayLike, rejected: ArrayLike, ratings: Sequence[str | None] | None = None
) -> dict[str, float]:
    """Share of pairs whose chosen response scores higher: {rating: share, ..., "average": share}.

    Arguments and ties as in `accuracy_table`, which also gives intervals and counts.
    """
    return {row["rating"]: row["mean"] for row in accuracy_table(chosen, rejected, ratings)}


def accuracy_table(
    chosen: ArrayLike, rejected: ArrayLike, ratings: Sequence[str | None] | None = None
) -> list[dict]:
    """Accuracy with 95 % Wilson intervals, one row a rating present, from clear to unclear.

    chosen, rejected: scores [n]; ratings: n of `RATINGS` or None (a row "unrated" of its own).
    Rows are {rating, mean, low, high, pairs, ties}, the last one "average" over all pairs. A tie
    counts half, as a coin would get it; `ties` says how many there were. ValueError for no pairs,
    unequal lengths, an unknown rating or a score that is not finite.
    """
    first, second = paired_scores(chosen, rejected)
    labels = [UNRATED if rating is None else rating for rating in ratings or [None] * len(first)]
    if len(labels) != len(first):
        raise ValueError(f"ratings must have {len(first)} entries, got {len(labels)}")
    unknown = set(labels) - {*RATINGS, UNRATED}
    if unknown:
        raise ValueError(f"unknown rating {min(unknown)!r}, expected one of {list(RATINGS)}")

    correct = np.where(first == second, 0.5, first > second)
    ties = first == second
    kept = np.array(labels)
    rows = []
    for name in (*RATINGS, UNRATED, AVERAGE):
        inside = np.ones(len(first), dtype=bool) if name == AVERAGE else kept == name
        pairs = int(inside.sum())
        if pairs:
            interval = wilson(float(correct[inside].sum()), pairs)
            rows.append(
                {
                    "rating": name,
                    **interval._asdict(),
                    "pairs": pairs,
                    "ties": int(ties[inside].sum()),
                }
            )
    return rows


def paired_scores(chosen: ArrayLike, rejected: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as fp64 [n]; ValueError for no pairs, unequal lengths or a score not finite."""
    first = np.asarray(chosen, dtype=np.float64)
    second = np.asarray(rejected, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            "chosen and rejected must be equally long non-empty vectors, "
            f"got shapes {first.shape} and {second.shape}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("chosen and rejected scores must be finite")
    return first, second
