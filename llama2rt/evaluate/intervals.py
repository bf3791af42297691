"""Confidence intervals: every share and mean this project prints comes with one.

Wilson's interval for shares, which stays honest at 0 % and 100 % where a bootstrap collapses to a
point; the percentile bootstrap for means; the paired bootstrap for the difference of two versions
on the same prompts, whose common difficulty cancels. The unit of resampling is whatever one value
stands for, so several samples of one prompt are averaged before they come here, or summed and
counted for `bootstrap_grouped`: treating them as independent would make the interval too narrow.
"""

from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_DRAWS_AT_ONCE = 1 << 22  # 32 MiB of int64 indices


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def wilson(successes: float, trials: int, *, confidence: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval (Wilson, 1927).

    `successes` may be fractional (a tie is half a success); the interval is then conservative,
    since a value between 0 and 1 varies less than a coin with the same mean. ValueError for no
    trials or a count outside [0, trials].
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in [0, {trials}], got {successes}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    denominator = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / denominator
    # At a share of exactly 0 or 1 the formula's end is that share, up to rounding.
    return Interval(
        float(share), float(min(share, max(0.0, centre - half))), float(max(share, centre + half))
    )


def bootstrap(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values` [n] with the percentile bootstrap interval (Efron and Tibshirani, ch. 13).

    The same values and seed give the same interval. One value, or equal values, give an interval
    of no width. ValueError for no values or a non-finite one.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"values must be a non-empty vector, got shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("values must be finite")
    means = np.concatenate(
        [data[drawn].mean(axis=1) for drawn in _resamples(len(data), resamples, seed)]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def bootstrap_columns(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Interval]:
    """`bootstrap` of each column of [n, columns], equal to it up to rounding, in little more time
    than one column takes: all are measured on the same units and share the draws."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 2 or not data.size:
        raise ValueError(f"values must be [n, columns] and not empty, got shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("values must be finite")
    units = len(data)
    means = []
    for drawn in _resamples(units, resamples, seed):
        cells = drawn + units * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means.append(times @ data / units)
    ends = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [
        Interval(float(mean), float(low), float(high))
        for mean, low, high in zip(data.mean(axis=0), *ends, strict=True)
    ]


def bootstrap_grouped(
    values: Iterable[Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of all values of units that have several each, `values` by unit, with the percentile
    bootstrap interval over units.

    A unit weighs as much as it has values, in the estimate and in every resample: the mean of the
    units' means is another quantity where counts differ, and its interval may exclude this mean.
    ValueError for no units, a unit without values, or a non-finite value.
    """
    parts = np.array([(sum(of_unit), len(of_unit)) for of_unit in values], np.float64).T
    if not parts.size or not parts[1].all():
        raise ValueError("values: expected units, each with values")
    if not np.isfinite(parts).all():
        raise ValueError("values must be finite")
    drawn = _resamples(parts.shape[1], resamples, seed)
    means = np.concatenate([np.divide(*parts[:, rows].sum(axis=2)) for rows in drawn])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(parts[0].sum() / parts[1].sum()), float(low), float(high))


def _resamples(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the units drawn, int64 [some resamples, units] at a time."""
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // units)
    for start in range(0, resamples, rows):
        yield generator.integers(0, units, (min(rows, resamples - start), units))


def paired(
    a: ArrayLike,
    b: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the same units (prompts), a and b [n], with its bootstrap interval.

    The difference is real at this confidence where the interval leaves 0 out.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must pair up, got shapes {first.shape} and {second.shape}")
    return bootstrap(first - second, confidence=confidence, resamples=resamples, seed=seed)
