"""Pairs of a prompt's several answers, which many sources score or rank."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from llama2rt.data.formats.registry import Row, Selection
from llama2rt.errors import InputError

Scored = tuple[str, float]

MOST_ANSWERS = 64
"""to one prompt, where all pairs of them are made: ten thousand would make fifty million"""


def require_few(key: str, answers: Sequence[object], most: int = MOST_ANSWERS) -> None:
    """InputError for more answers than are paired."""
    if len(answers) > most:
        raise InputError(f"{key}: {len(answers)} answers; at most {most} to a prompt are paired")


def ranked(
    prompt: list[Row], answers: list[Scored], source: str, selection: Selection
) -> Iterator[Row]:
    """A comparison for each two answers whose scores differ, and differ enough."""
    for (a, score_a), (b, score_b) in combinations(answers, 2):
        if a.strip() == b.strip():
            selection.left_out["pairs of one text"] += 1
        elif score_a == score_b:
            selection.left_out["pairs of equal score"] += 1
        elif selection.far_enough(abs(score_a - score_b)):
            chosen, rejected = (a, b) if score_a > score_b else (b, a)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}
