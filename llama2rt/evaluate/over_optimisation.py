"""Does a higher reward still mean a better response? Reward models against a judge.

A policy tuned on a reward model finds responses that the model overrates (Gao, Schulman and
Hilton, 2023, "Scaling laws for reward model overoptimization"; Llama 2, section 3.4.1, checks its
models against people for the same reason). Three views, from coarse to fine: the judge's worth by
quantiles of reward, which bends down where the highest rewards are no longer the best responses;
the rank correlation over all responses; and the one within a prompt, which best-of-N depends on and
which the difference between easy and hard prompts cannot raise.

A judge is whatever is trusted more than the reward model: people, a stronger model, a rule. Its
`worth` of a response is a finite number, higher for better, in any unit.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate import length
from llama2rt.evaluate.intervals import bootstrap

BINS = 10
LEAST = 10  # responses a bin, where there are fewer than BINS times as many
RESAMPLES = 1000


class Bin(TypedDict):
    """Responses of one quantile of reward: mean `reward`, the judge's worth, their number."""

    reward: float
    mean: float
    low: float
    high: float
    responses: int


class Correlation(TypedDict):
    """Spearman's rank correlation with its 95 % interval over prompts; None where undefined.

    `undefined` counts the prompts whose rewards or worths are all equal, as those of a single
    response are; it is 0 or all prompts for the correlation over all responses.
    """

    mean: float | None
    low: float | None
    high: float | None
    undefined: int


class RewardAgainstJudge(TypedDict):
    """The three views of one version's responses."""

    bins: list[Bin]
    pooled: Correlation
    per_prompt: Correlation


def reward_against_judge(
    rewards: ArrayLike, worth: ArrayLike, *, seed: int = 0
) -> RewardAgainstJudge:
    """Compare rewards [prompts, samples] with the judge's worth [prompts, samples].

    ValueError unless both have the same two-dimensional shape and finite entries.
    """
    x, y = np.asarray(rewards, dtype=np.float64), np.asarray(worth, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or not x.size:
        raise ValueError(
            f"rewards and worth must share a shape [prompts, samples], got {x.shape}, {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("rewards and worth must be finite")
    return {
        "bins": _by_quantile(x, y, seed),
        "pooled": _pooled(x, y, seed),
        "per_prompt": _per_prompt(x, y, seed),
    }


def _by_quantile(rewards: np.ndarray, worth: np.ndarray, seed: int) -> list[Bin]:
    """At most BINS bins of about equally many responses; equal rewards share a bin. The unit of an
    interval is a prompt: its responses in the bin are averaged first."""
    bins = min(BINS, max(1, rewards.size // LEAST))
    edges = np.quantile(rewards, np.linspace(0, 1, bins + 1)[1:-1])
    index = np.searchsorted(edges, rewards, side="right")
    rows: list[Bin] = []
    for number in np.unique(index):
        inside = index == number
        held = inside.any(axis=1)
        by_prompt = np.where(inside, worth, 0.0)[held].sum(axis=1) / inside[held].sum(axis=1)
        found = bootstrap(by_prompt, seed=seed)
        rows.append(
            {
                "reward": float(rewards[inside].mean()),
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "responses": int(inside.sum()),
            }
        )
    return rows


def _pooled(rewards: np.ndarray, worth: np.ndarray, seed: int) -> Correlation:
    """Over all responses; the interval draws whole prompts, whose samples belong together."""
    prompts, samples = rewards.shape
    x, y = (np.unique(values.ravel(), return_inverse=True)[1] for values in (rewards, worth))
    estimate = _spearman(x, y, np.ones(rewards.size))
    if not np.isfinite(estimate):
        return {"mean": None, "low": None, "high": None, "undefined": prompts}
    generator = np.random.default_rng(seed)
    drawn = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        times = np.bincount(generator.integers(0, prompts, prompts), minlength=prompts)
        drawn[i] = _spearman(x, y, np.repeat(times, samples).astype(np.float64))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"mean": estimate, "low": float(low), "high": float(high), "undefined": 0}


def _per_prompt(rewards: np.ndarray, worth: np.ndarray, seed: int) -> Correlation:
    """Spearman's correlation is Pearson's of the ranks."""
    by_rank = [np.stack([_ranks(row) for row in values]) for values in (rewards, worth)]
    found = length.correlation(*by_rank, seed=seed)
    if found.mean is None:
        return {"mean": None, "low": None, "high": None, "undefined": found.undefined}
    mean, low, high = found.mean
    return {"mean": mean, "low": low, "high": high, "undefined": found.undefined}


def _spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Rank correlation of n pairs that count `weights` times; NaN where one side is constant.

    x, y: int [n], indices of each value among the distinct values in rising order. So a resample
    of millions needs no sorting: a rank is the weight below a value and half of that upon it.
    """
    u, v = (_weighted_ranks(index, weights) for index in (x, y))
    total = weights.sum()
    u, v = u - (weights @ u) / total, v - (weights @ v) / total
    scale = np.sqrt((weights @ (u * u)) * (weights @ (v * v)))
    return float((weights @ (u * v)) / scale) if scale > 0 else float("nan")


def _weighted_ranks(index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    held = np.bincount(index, weights=weights)
    return (np.cumsum(held) - held / 2)[index]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mid-ranks, up to a constant: equal values share the mean of theirs."""
    index = np.unique(values, return_inverse=True)[1]
    return _weighted_ranks(index, np.ones(len(values)))
