"""Pairs of a prompt's several answers, which many sources score or rank."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from llama2rt.data.formats.registry import Row, Selection
from llama2rt.data.formats.values import item, score
from llama2rt.data.json_values import type_name
from llama2rt.errors import InputError

Scored = tuple[str, float]

MOST_ANSWERS = 64
"""to one prompt, where all pairs of them are made: ten thousand would make fifty million"""


def holding(key: str, held: str) -> Callable[[Row], bool]:
    """Whether a row has a list under `key`, some item of which is an object with a key `held`."""

    def has(row: Row) -> bool:
        items = row[key]
        return isinstance(items, list) and any(isinstance(i, dict) and held in i for i in items)

    return has


def require_few(key: str, answers: Sequence[object], most: int = MOST_ANSWERS) -> None:
    """InputError for more answers than are paired."""
    if len(answers) > most:
        raise InputError(f"{key}: {len(answers)} answers; at most {most} to a prompt are paired")


def with_scores(
    key: str, answers: Sequence[object], said: str, scored: str, selection: Selection
) -> list[Scored]:
    """(text, score) of each of `answers`, objects that hold them under `said` and `scored`; blank
    ones are left out. InputError with the item of the list `key`."""
    found = []
    for number, answer in enumerate(answers, start=1):
        where = f"{key}: item {number}"
        held = item(where, answer, said, scored)
        value, text = score(f"{where} {scored}", held[scored]), held[said]
        if not isinstance(text, str):
            raise InputError(f"{where} {said}: expected text, got {type_name(text)}")
        if selection.says_something(text):
            found.append((text, value))
    return found


def ranked(
    prompt: list[Row], answers: list[Scored], source: str, selection: Selection
) -> Iterator[Row]:
    """A comparison for each two answers whose scores differ, and differ enough."""
    for (a, score_a), (b, score_b) in combinations(answers, 2):
        if a.strip() == b.strip():
            selection.drop("identical_responses", "pairs of one text")
        elif score_a == score_b:
            selection.left_out["pairs of equal score"] += 1
        elif selection.far_enough(abs(score_a - score_b)):
            chosen, rejected = (a, b) if score_a > score_b else (b, a)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}
