"""Agreement of raters: Gwet's AC1 (nominal) and AC2 (weighted), as in Llama 2 (section 3.4).

Unlike Cohen's or Fleiss' kappa they stay meaningful when nearly all items fall in one category,
the usual case for safety labels. Definitions and the variance follow Gwet, "Handbook of
Inter-Rater Reliability" (4th edition, chapters 4 to 6): any number of raters, missing ratings
allowed.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

WEIGHTS = ("nominal", "ordinal", "linear", "quadratic")


@dataclass(frozen=True)
class Agreement:
    """How far raters agree, with its interval."""

    coefficient: float
    """1 for full agreement, 0 for what chance gives"""
    standard_error: float
    """over items, from Gwet's linearised variance; NaN for a single item"""
    low: float
    """coefficient - z * standard_error, at least -1; a little high with fewer than some 30 items,
    for which the normal quantile is narrow"""
    high: float
    """coefficient + z * standard_error, at most 1; a little low then"""
    observed: float
    """share of agreeing pairs of ratings"""
    by_chance: float
    """the share expected of raters who rate at random"""
    items: int


def gwet(
    ratings: ArrayLike,
    *,
    categories: int | None = None,
    weights: str = "nominal",
    confidence: float = 0.95,
) -> Agreement:
    """Agreement of raters: AC1 with weights "nominal", AC2 with the three others.

    ratings: [items, raters], category indices 0..categories-1 in their order, NaN or negative
    where a rater gave none. Items nobody rated are ignored; those with one rating inform chance
    agreement only. `categories` defaults to the largest index + 1: give it where the scale has
    categories nobody used. ValueError if no item has two ratings.
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"ratings must be [items, raters], got shape {table.shape}")
    given = np.where(np.isnan(table), -1, table).astype(np.int64)
    scale = int(given.max(initial=-1)) + 1 if categories is None else categories
    if given.max(initial=-1) >= scale:
        raise ValueError(f"rating {given.max()} lies outside {scale} categories")
    scale = max(scale, 2)
    counts = (given[:, :, None] == np.arange(scale)).sum(axis=1).astype(np.float64)
    counts = counts[counts.sum(axis=1) > 0]
    raters = counts.sum(axis=1)
    several = raters >= 2
    if not several.any():
        raise ValueError("agreement needs an item with at least two ratings")

    similarity = weight_matrix(scale, weights)
    items = len(counts)
    pairs = (counts * (counts @ similarity - 1)).sum(axis=1)
    observed_each = np.where(several, pairs / np.maximum(raters * (raters - 1), 1), 0.0)
    observed = observed_each[several].mean()
    shares = counts / raters[:, None]
    prevalence = shares.mean(axis=0)
    chance_scale = similarity.sum() / (scale * (scale - 1))
    chance = chance_scale * (prevalence * (1 - prevalence)).sum()
    coefficient = (observed - chance) / (1 - chance)

    error = np.nan
    if items > 1:
        chance_each = chance_scale * shares @ (1 - prevalence)
        each = items / several.sum() * (observed_each - chance * several) / (1 - chance)
        each = each - 2 * (1 - coefficient) * (chance_each - chance) / (1 - chance)
        error = np.sqrt(((each - coefficient) ** 2).sum() / (items * (items - 1)))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Agreement(
        coefficient=float(coefficient),
        standard_error=float(error),
        low=float(max(-1.0, coefficient - half)),
        high=float(min(1.0, coefficient + half)),
        observed=float(observed),
        by_chance=float(chance),
        items=items,
    )


def weight_matrix(categories: int, weights: str) -> np.ndarray:
    """How much two categories count as agreeing, fp64 [categories, categories], 1 on the diagonal.

    nominal: 0 off the diagonal. ordinal: 1 - C(d + 1, 2) / C(categories, 2) at distance d.
    linear and quadratic: 1 - d / (categories - 1), to the first and second power.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    index = np.arange(categories)
    distance = np.abs(index[:, None] - index[None, :])
    if weights == "nominal":
        return (distance == 0).astype(np.float64)
    if weights == "ordinal":
        return 1 - distance * (distance + 1) / (categories * (categories - 1))
    return 1 - (distance / (categories - 1)) ** (1 if weights == "linear" else 2)
