"""What the figures of models and versions share: intervals, small notes, a legend."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Estimate = tuple[float, float, float]
"""(mean, low, high): a value and the ends of its 95 % interval."""


def columns(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, lows and highs, fp64 [n] each."""
    table = np.asarray(estimates, dtype=np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[2, n]: how far each interval reaches below and above its mean, as `errorbar` wants it."""
    return np.clip(np.stack([mean - low, high - mean]), 0, None)


def note(
    axes: Axes, text: str, at: tuple[Any, Any], offset: tuple[float, float], **style: Any
) -> None:
    """Small text, `offset` points from the point `at` of the axes."""
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=8.5, **style)


def legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, where it can never cover a line."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(6, len(labels)),
        columnspacing=1.6,
        handlelength=2.8,
    )
