"""Length bias: whether a reward model prefers long answers.

RLHF Workflow (Dong et al., 2024, section 2) takes several responses to each prompt and correlates
reward and length (Pearson) per prompt, so that prompts that call for long answers do not look like
a bias. The means reported there are 0.19 for UltraRM-13B and 0.06 for their own model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate.intervals import Interval, bootstrap


@dataclass(frozen=True)
class LengthCorrelation:
    """Reward-length correlation, prompt by prompt."""

    per_prompt: np.ndarray
    """fp64 [prompts], NaN where undefined"""
    mean: Interval | None
    """over the defined ones, with its 95 % bootstrap interval; None where all are undefined"""
    undefined: int
    """prompts whose rewards or lengths are all equal: they have no correlation, and counting it as
    0 would make the mean smaller"""


def correlation(rewards: ArrayLike, lengths: ArrayLike, *, seed: int = 0) -> LengthCorrelation:
    """Correlate rewards [prompts, samples] with lengths [prompts, samples] (tokens or characters).

    ValueError unless both have the same two-dimensional shape and finite entries.
    """
    x, y = np.asarray(rewards, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or not x.size:
        raise ValueError(
            f"rewards and lengths must share a shape [prompts, samples], got {x.shape}, {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("rewards and lengths must be finite")
    defined = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    u, v = x[defined], y[defined]
    u, v = u - u.mean(axis=1, keepdims=True), v - v.mean(axis=1, keepdims=True)
    per_prompt = np.full(len(x), np.nan)
    per_prompt[defined] = (u * v).sum(axis=1) / np.sqrt((u * u).sum(axis=1) * (v * v).sum(axis=1))
    mean = bootstrap(per_prompt[defined], seed=seed) if defined.any() else None
    return LengthCorrelation(per_prompt, mean, int((~defined).sum()))
