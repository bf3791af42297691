"""Which of two versions answers better, prompt by prompt.

`win_rate` and `matrix` compare reward scores, which do not depend on the order of the answers.
`judged` takes any callable that sees two answers side by side, and asks it in both orders, because
judges favour a position (Llama 2, section 3.4). A tie counts half. Intervals are Wilson's over
prompts, the unit that is drawn independently.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate.intervals import Interval, wilson

Judge = Callable[[list[dict[str, str]], str, str], float]
"""(messages, first answer, second answer) -> preference for the first in [0, 1], 0.5 a tie."""


@dataclass(frozen=True)
class WinRate:
    """How often A beats B."""

    rate: Interval
    """share of prompts won by A, ties counted half"""
    wins: int
    """prompts; with several samples a prompt, by the majority of its pairings"""
    ties: int
    losses: int


@dataclass(frozen=True)
class JudgedWinRate(WinRate):
    """A win rate from a judge asked twice a prompt."""

    a_first: Interval
    """A's win rate when its answer comes first; it differs from `b_first` by the position bias"""
    b_first: Interval
    """A's win rate when its answer comes second"""
    consistent: float
    """share of prompts on which both orders gave the same verdict"""


def win_rate(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> WinRate:
    """Win rate of A over B from scores on the same prompts.

    a[i], b[i]: the score, or the scores of several samples, for prompt i; every sample of A meets
    every sample of B, and the prompt counts once. ValueError for no prompts, unequal numbers of
    them, a prompt without scores or a score that is not finite.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a and b must cover the same prompts, got {len(a)} and {len(b)}")
    outcomes = np.empty(len(a))
    for i, (ours, theirs) in enumerate(zip(a, b, strict=True)):
        x = np.atleast_1d(np.asarray(ours, dtype=np.float64))
        y = np.atleast_1d(np.asarray(theirs, dtype=np.float64))
        if not (x.size and y.size and np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(f"prompt {i} needs finite scores on both sides")
        outcomes[i] = (np.sign(x[:, None] - y[None, :]).mean() + 1) / 2
    return WinRate(*_summary(outcomes))


def judged(
    judge: Judge,
    prompts: Sequence[list[dict[str, str]]],
    a: Sequence[str],
    b: Sequence[str],
) -> JudgedWinRate:
    """Win rate of answers `a` over answers `b` by a judge, each prompt asked in both orders.

    A's outcome on a prompt is the mean of the two verdicts, so a judge that always takes the first
    answer gives a tie. ValueError for a verdict outside [0, 1] or unequal numbers of answers.
    """
    if not len(prompts) == len(a) == len(b) or not len(prompts):
        raise ValueError(
            f"need one answer a prompt, got {len(prompts)} prompts, {len(a)} and {len(b)} answers"
        )
    verdicts = np.empty((2, len(prompts)))
    for i, (messages, ours, theirs) in enumerate(zip(prompts, a, b, strict=True)):
        verdicts[:, i] = judge(messages, ours, theirs), 1 - judge(messages, theirs, ours)
    if not ((verdicts >= 0) & (verdicts <= 1)).all():
        raise ValueError("a judge's preference must lie in [0, 1]")
    a_first, b_first = (wilson(float(order.sum()), len(prompts)) for order in verdicts)
    agree = np.sign(verdicts[0] - 0.5) == np.sign(verdicts[1] - 0.5)
    return JudgedWinRate(
        *_summary(verdicts.mean(axis=0)), a_first, b_first, consistent=float(agree.mean())
    )


def matrix(scores: Mapping[str, Sequence[ArrayLike]]) -> tuple[list[str], np.ndarray]:
    """All versions against each other: names, and [V, V] win rates of the row over the column.

    scores[name] as in `win_rate`, the same prompts in the same order for each. The diagonal is
    NaN: a version does not meet itself.
    """
    names = list(scores)
    rates = np.full((len(names), len(names)), np.nan)
    for i, ours in enumerate(names):
        for j in range(i):
            rates[i, j] = win_rate(scores[ours], scores[names[j]]).rate.mean
            rates[j, i] = 1 - rates[i, j]
    return names, rates


def _summary(outcomes: np.ndarray) -> tuple[Interval, int, int, int]:
    wins, losses = int((outcomes > 0.5).sum()), int((outcomes < 0.5).sum())
    rate = wilson(float(outcomes.sum()), len(outcomes))
    return rate, wins, len(outcomes) - wins - losses, losses
