"""What more samples buy: expected best and expected median reward among N samples of a prompt.

Figures 7 and 8 of Llama 2 (section 3.2.3): the gap between the two curves is what rejection
sampling can gain; the same curves at several temperatures say which one to sample at.

One random subset of each size would give a noisy curve, which may even fall. The mean over all
subsets of N of the S samples is known exactly: the k-th smallest sample is the j-th smallest of a
random subset with probability C(k-1, j-1) C(S-k, N-j) / C(S, N).
"""

from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate.intervals import bootstrap_columns


class Curves(TypedDict):
    """Expected reward against the number of samples, mean over prompts."""

    n: list[int]
    """numbers of samples"""
    max: list[float]
    """expected largest reward among as many samples"""
    median: list[float]


def curves(rewards: ArrayLike) -> Curves:
    """Curves for N = 1..S from rewards [prompts, S], exact over all subsets of a prompt's samples.

    The median of an even number is the mean of the middle two. At N = 1 both are the mean
    reward. ValueError for an empty or non-finite array.
    """
    ordered = _ordered(rewards)
    samples = ordered.shape[1]
    quantiles = ordered.mean(axis=0)  # the weights are linear, so prompts can be averaged first
    sizes = list(range(1, samples + 1))
    best, middle = [], []
    for size in sizes:
        best.append(float(_weights(samples, size, size) @ quantiles))
        lower, upper = (size + 1) // 2, size // 2 + 1
        halves = (_weights(samples, size, lower) + _weights(samples, size, upper)) / 2
        middle.append(float(halves @ quantiles))
    return {"n": sizes, "max": best, "median": middle}


def largest(rewards: ArrayLike) -> np.ndarray:
    """Expected largest reward among N = 1..S of each prompt's samples, fp64 [prompts, S], from
    rewards [prompts, S]: what `curves` averages, for an interval over prompts. ValueError as
    there."""
    ordered = _ordered(rewards)
    samples = ordered.shape[1]
    weights = [_weights(samples, size, size) for size in range(1, samples + 1)]
    return ordered @ np.stack(weights, axis=1)


def chosen(rewards: ArrayLike, worth: ArrayLike) -> np.ndarray:
    """Expected worth of the sample of largest reward among N = 1..S of each prompt's, fp64
    [prompts, S], from rewards and worth [prompts, S]: what a judge says of best-of-N by a reward
    model. Samples of equal reward are as likely to be taken. ValueError as in `curves`."""
    scores = np.asarray(rewards, dtype=np.float64)
    _ordered(scores)  # checks
    values = np.asarray(worth, dtype=np.float64)
    if values.shape != scores.shape or not np.isfinite(values).all():
        raise ValueError(f"worth: expected finite {scores.shape}, got {values.shape}")
    samples = scores.shape[1]
    # Of equals each is as likely: all have their mean.
    same = scores[:, :, None] == scores[:, None, :]
    shared = (same @ values[:, :, None])[:, :, 0] / same.sum(axis=2)
    by_rank = np.take_along_axis(shared, scores.argsort(axis=1, kind="stable"), axis=1)
    weights = [_weights(samples, size, size) for size in range(1, samples + 1)]
    result: np.ndarray = by_rank @ np.stack(weights, axis=1)
    return result


def judged(rewards: ArrayLike, worth: ArrayLike, *, seed: int = 0) -> list[dict[str, Any]]:
    """A row {n, chosen, best} for N = 1, 2, 4 ... and S samples a prompt, from rewards and worth
    [prompts, S]: the worth of the one that `rewards` choose and of the best there is, each {mean,
    low, high} with its interval over prompts. Where worth is 1 for right and 0 for wrong, the
    former is the share of right answers of best-of-N, the latter pass@N."""
    picked, best = chosen(rewards, worth), largest(worth)
    samples = picked.shape[1]
    sizes = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    columns = np.concatenate([table[:, [n - 1 for n in sizes]] for table in (picked, best)], axis=1)
    found = [interval._asdict() for interval in bootstrap_columns(columns, seed=seed)]
    return [
        {"n": n, "chosen": found[i], "best": found[len(sizes) + i]} for i, n in enumerate(sizes)
    ]


def _ordered(rewards: ArrayLike) -> np.ndarray:
    ordered = np.sort(np.asarray(rewards, dtype=np.float64), axis=-1)
    if ordered.ndim != 2 or not ordered.size:
        raise ValueError(f"rewards must be [prompts, samples] and not empty, got {ordered.shape}")
    if not np.isfinite(ordered).all():
        raise ValueError("rewards must be finite")
    return ordered


def _weights(samples: int, size: int, rank: int) -> np.ndarray:
    """Probability that each of the sorted samples is the `rank`-th smallest of a subset."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, samples + 1)))])

    def log_choose(n: np.ndarray, k: int) -> np.ndarray:
        inside = np.clip(n - k, 0, None)
        value = log_factorial[n] - log_factorial[k] - log_factorial[inside]
        return np.where(n >= k, value, -np.inf)

    order = np.arange(1, samples + 1)
    below, above = log_choose(order - 1, rank - 1), log_choose(samples - order, size - rank)
    return np.exp(below + above - log_choose(np.array(samples), size))
