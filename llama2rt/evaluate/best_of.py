"""What more samples buy: expected best and expected median reward among N samples of a prompt.

Figures 7 and 8 of Llama 2 (section 3.2.3): the gap between the two curves is what rejection
sampling can gain; the same curves at several temperatures say which one to sample at.

One random subset of each size would give a noisy curve, which may even fall. The mean over all
subsets of N of the S samples is known exactly: the k-th smallest sample is the j-th smallest of a
random subset with probability C(k-1, j-1) C(S-k, N-j) / C(S, N).
"""

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike


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
