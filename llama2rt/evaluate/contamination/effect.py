"""Did what a model had read of an evaluation set raise its score there?

Llama 2, appendix A.6: if it did, the cleanest samples score below the others and the dirtiest above
them. Four subsets, which overlap, are held against the mean of all samples.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate.intervals import bootstrap

CLEAN, DIRTY = 0.2, 0.8
"""shares of a sample's tokens below which it is clean, and from which on it is dirty: A.6"""
SIGNIFICANT = 2.0
"""|Z| beyond which a subset's score differs from that of all samples: A.6"""
SUBSETS = ("clean", "not_clean", "not_dirty", "dirty")


class Subset(TypedDict):
    """A subset's `samples`, mean `share` of contaminated tokens, mean `score` with its 95 %
    interval, and how many standard errors that is from the mean score of all samples, `z`. None of
    an empty subset, and `z` where all scores are equal."""

    samples: int
    share: float | None
    score: dict[str, float] | None
    z: float | None


def subsets(shares: ArrayLike, scores: ArrayLike | None = None) -> dict[str, Subset]:
    """The four subsets of n samples, from their `shares` of contaminated tokens [n] and, if known,
    their `scores` [n].

    z = (mean - mu) / (sigma / sqrt(samples)), where mu and sigma are those of all scores: the
    paper's Z_n. Of its Table 51 it gives every row that was checked (tests/evaluate).
    """
    share = np.asarray(shares, np.float64)
    members = (share < CLEAN, share >= CLEAN, share < DIRTY, share >= DIRTY)
    found: dict[str, Subset] = {}
    for name, inside in zip(SUBSETS, members, strict=True):
        count = int(inside.sum())
        row = Subset(samples=count, share=None, score=None, z=None)
        if count:
            row["share"] = float(share[inside].mean())
        if count and scores is not None:
            values = np.asarray(scores, np.float64)
            row["score"] = bootstrap(values[inside])._asdict()
            row["z"] = z_statistic(values[inside].mean(), values.mean(), values.std(), count)
        found[name] = row
    return found


def z_statistic(mean: float, of_all: float, deviation: float, samples: int) -> float | None:
    """Standard errors between the mean score of `samples` samples and that of all, whose standard
    deviation is `deviation`; None where that is 0."""
    return float((mean - of_all) / deviation * np.sqrt(samples)) if deviation > 0 else None


def affected(found: dict[str, Subset]) -> bool | None:
    """Whether the scores speak for an effect: all four subsets differ significantly, clean and not
    dirty samples for the worse, the others for the better. None without scores."""
    values = [found[name]["z"] for name in SUBSETS]
    if all(row["score"] is None for row in found.values()):
        return None
    signs = (-1, 1, -1, 1)
    return all(
        z is not None and sign * z > SIGNIFICANT for z, sign in zip(values, signs, strict=True)
    )


def table(
    by_length: dict[int, np.ndarray], scores: Sequence[float] | None = None
) -> dict[str, Any]:
    """JSON-able: the `subsets` for each least length of a span, and `affected_at`, the largest
    length whose scores speak for an effect (A.6 reports that one), or None."""
    rows = []
    lengths: list[int] = []
    for length, shares in by_length.items():
        found = subsets(shares, scores)
        rows.append(
            {
                "length": length,
                "share": float(np.mean(shares)),
                "subsets": found,
                "affected": affected(found),
            }
        )
        if affected(found):
            lengths.append(length)
    return {"lengths": rows, "affected_at": max(lengths, default=None)}
