"""Ranking answers that are only compared two at a time, as a pairwise preference model does.

`win_rates` compares every two of a prompt's n answers, n (n - 1) / 2 comparisons; `tournament`
finds the best and the worst in at most 3 n / 2, and says little of the others (RLHF Workflow, arXiv
2405.07863, ranks n > 2 answers by a tournament, whose cost is linear). Both give each answer a
number in [0, 1], comparable between answers to one prompt only.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Ranking = Literal["win_rate", "tournament"]
Match = tuple[int, int, int]
"""(prompt, answer, other answer), by index"""
Compare = Callable[[Sequence[Match]], np.ndarray]
"""fp64 [matches]: the probability that a match's first answer is better. It is asked for the
matches of all prompts at once"""


def rank(sizes: Sequence[int], compare: Compare, how: Ranking) -> list[np.ndarray]:
    """fp64 [n] of each prompt, higher for better; `sizes`: how many answers each has."""
    return (win_rates if how == "win_rate" else tournament)(sizes, compare)


def win_rates(sizes: Sequence[int], compare: Compare) -> list[np.ndarray]:
    """The mean probability of being better than each other answer; 0.5 of one alone."""
    matches = [
        (prompt, a, b) for prompt, n in enumerate(sizes) for a in range(n) for b in range(a + 1, n)
    ]
    sums = [np.zeros(n) for n in sizes]
    if matches:
        for (prompt, a, b), first in zip(matches, compare(matches).tolist(), strict=True):
            sums[prompt][a] += first
            sums[prompt][b] += 1 - first
    return [
        of_prompt / (n - 1) if n > 1 else np.full(n, 0.5)
        for of_prompt, n in zip(sums, sizes, strict=True)
    ]


def tournament(sizes: Sequence[int], compare: Compare) -> list[np.ndarray]:
    """Standings of a knock-out, and of one among those who won nothing, where the worse goes on.

    With W and L rounds in the two, an answer that goes on w times in the first and l times in the
    second stands at (L + 1 + w - l) / (W + L + 2). One answer has the most, one the least; where
    the comparisons follow an order of the answers, these are its first and last.
    """
    won = _knock_out([list(range(n)) for n in sizes], compare, better=True)
    winless = [[a for a in range(n) if a not in won[i].winners] for i, n in enumerate(sizes)]
    lost = _knock_out(winless, compare, better=False)
    standings = []
    for n, up, down in zip(sizes, won, lost, strict=True):
        gone_on = [
            (up.survived.get(a, 0) if a in up.winners else 0) - down.survived.get(a, 0)
            for a in range(n)
        ]
        total = up.rounds + down.rounds + 2
        standings.append((down.rounds + 1 + np.array(gone_on, dtype=np.float64)) / total)
    return standings


class _Bracket:
    """How one prompt's knock-out went."""

    def __init__(self, answers: list[int]) -> None:
        self.remaining = answers
        self.rounds = 0
        self.survived = dict.fromkeys(answers, 0)
        self.winners: set[int] = set()

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.remaining[::2], self.remaining[1::2], strict=False))

    def advance(self, gone_on: list[int]) -> None:
        # Whoever was left over plays first in the next round, so that nobody waits twice running.
        idle = self.remaining[2 * len(gone_on) :]
        self.rounds += 1
        self.winners.update(gone_on)
        self.remaining = idle + gone_on
        for answer in self.remaining:
            self.survived[answer] += 1


def _knock_out(groups: list[list[int]], compare: Compare, *, better: bool) -> list[_Bracket]:
    """The brackets of all prompts, a round of all of them at a time; of two that are equally good
    the first goes on."""
    brackets = [_Bracket(group) for group in groups]
    while running := [(i, b) for i, b in enumerate(brackets) if len(b.remaining) > 1]:
        matches = [(prompt, *pair) for prompt, bracket in running for pair in bracket.pairs()]
        results = iter(compare(matches).tolist())
        for _, bracket in running:
            bracket.advance(
                [a if (next(results) >= 0.5) == better else b for a, b in bracket.pairs()]
            )
    return brackets
