"""A list of merges that gives the same ids as scores.

SentencePiece merges the adjacent pair whose piece has the highest score (tiktoken: the lowest
rank), the leftmost of equal ones. `tokenizers` merges the pair that comes first in a list. A
piece's merges are its splits into two other pieces, ordered by the piece's score. Where two pairs
have the same score, a list can express "leftmost" only if each pair can come before every pair that
may overlap its right end, and if no merge makes a new pair of the same or a higher score.
"""

import graphlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

Part = TypeVar("Part", str, bytes)


class EqualScoresError(ValueError):
    """Pieces of equal score whose order no list of merges can express."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(
            f"pieces of equal score, such as {one!r} and {other!r}: SentencePiece merges the "
            "leftmost first, tokenizer.json one of them everywhere first"
        )


def ordered(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of every piece, in an order that follows the scores; EqualScoresError."""
    classes: dict[float, list[tuple[str, str]]] = defaultdict(list)
    pieces: dict[float, list[str]] = defaultdict(list)
    wholes: dict[str, list[str]] = defaultdict(list)  # of which a piece is one half
    for piece, score in scores.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [pair for pair in halves if pair[0] in scores and pair[1] in scores]
        if splits:
            classes[score] += sorted(splits, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            pieces[score].append(piece)
            for part in {part for pair in splits for part in pair}:
                wholes[part].append(piece)
    merges: list[tuple[str, str]] = []
    for score in sorted(classes, reverse=True):
        equal = pieces[score]
        if len(equal) == 1:
            merges += leftmost_first(classes[score])
            continue
        # Runs of one character each, such as LLaMA's 15 runs of spaces, meet no other piece: what
        # becomes of a run depends on its length alone, and lengths can all be compared.
        runs = all(len(set(piece)) == 1 for piece in equal)
        for piece in equal:
            for whole in wholes.get(piece, ()):
                if scores[whole] > score or (scores[whole] == score and not runs):
                    raise EqualScoresError(piece, whole)
        if runs:
            merges += classes[score]
            continue
        try:
            merges += _before_overlapping(classes[score])
        except graphlib.CycleError as error:
            one, other = ("".join(pair) for pair in error.args[1][:2])
            raise EqualScoresError(one, other) from None
    return merges


def leftmost_first(splits: Sequence[tuple[Part, Part]]) -> Sequence[tuple[Part, Part]]:
    """The splits of one piece, each before those that may overlap its right end.

    In periodic pieces, such as runs of spaces, two splits may each overlap the other. No text is
    known that leads a tokenizer to a state where both are open, and converted tokenizers are
    compared with the original on such runs; the given order is then kept.
    """
    try:
        return _before_overlapping(splits)
    except graphlib.CycleError:
        return splits


def _before_overlapping(pairs: Sequence[tuple[Part, Part]]) -> Sequence[tuple[Part, Part]]:
    by_left: dict[Part, list[tuple[Part, Part]]] = defaultdict(list)
    for pair in pairs:
        by_left[pair[0]].append(pair)
    before: dict[tuple[Part, Part], set[tuple[Part, Part]]] = {pair: set() for pair in pairs}
    found = False
    for pair in pairs:
        for overlapping in by_left.get(pair[1], ()):
            if overlapping != pair:
                before[overlapping].add(pair)
                found = True
    return list(graphlib.TopologicalSorter(before).static_order()) if found else pairs
