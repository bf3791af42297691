"""What a format is, and the list of them that the modules beside this one fill."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Convert = Callable[[Row], Iterator[Row]]


@dataclass
class Selection:
    """What of one file's rows is wanted, and how many are left out, by reason."""

    minimum_score_difference: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)
    unsupported: int = 0
    """pairs that are kept and whose own scores are equal or say the opposite"""

    def far_enough(self, difference: float) -> bool:
        """Whether a pair whose answers' scores differ by `difference` is kept; counts it
        otherwise."""
        if difference >= self.minimum_score_difference:
            return True
        self.left_out["pairs below the minimum score difference"] += 1
        return False

    def says_something(self, answer: Any) -> bool:
        """Whether one of several answers can be used at all; counts a blank one."""
        if not isinstance(answer, str) or answer.strip():
            return True
        self.left_out["blank answers"] += 1
        return False


Start = Callable[[Selection], Convert]


@dataclass(frozen=True)
class Format:
    """`kind` of record it gives; `keys` that a row must have, and what else must hold of it."""

    name: str
    kind: str
    keys: frozenset[str]
    matches: Callable[[Row], bool]
    start: Start
    """makes a fresh converter for one file: some remember earlier rows"""
    reads: Callable[[Row], Iterable[str]]
    """further keys of a row that the converter looks at"""
    carries: frozenset[str]
    """keys that published rows hold and that say nothing of use to a record"""
    decides: frozenset[str]
    """our own keys that only the format itself can give: a row that sets one contradicts it"""
    scores: frozenset[str] | None
    """None where `Selection.minimum_score_difference` means nothing to it; else the keys that it
    looks at for that alone"""

    def used(self, row: Row, selection: Selection) -> set[str]:
        """The keys of `row` that the converter looks at."""
        used = {*self.keys, *self.reads(row)}
        if selection.minimum_score_difference:
            used |= self.scores or frozenset()
        return used & row.keys()


FORMATS: list[Format] = []


def register(
    name: str,
    kind: str,
    keys: str,
    matches: Callable[[Row], bool] = lambda row: "messages" not in row,
    *,
    reads: str | Callable[[Row], Iterable[str]] = "",
    carries: str = "",
    decides: str = "",
    scores: str | None = None,
) -> Callable[[Start], Start]:
    """Adds a format to `FORMATS`; lists of keys are texts with spaces between."""

    def add(start: Start) -> Start:
        further = (lambda _row: reads.split()) if isinstance(reads, str) else reads
        FORMATS.append(
            Format(
                name,
                kind,
                frozenset(keys.split()),
                matches,
                start,
                further,
                frozenset(carries.split()),
                frozenset(decides.split()),
                None if scores is None else frozenset(scores.split()),
            )
        )
        return start

    return add


def stateless(convert: Convert) -> Start:
    """A converter that needs neither memory nor a selection, as what `register` takes."""
    return lambda _selection: convert


def selecting(convert: Callable[[Row, Selection], Iterator[Row]]) -> Start:
    """Likewise one that leaves out some of a row's answers or pairs, and has no memory."""
    return lambda selection: lambda row: convert(row, selection)


def recognise(row: Row, kind: str) -> Format | None:
    """The first foreign format of `kind` that `row` is in."""
    for candidate in FORMATS:
        if candidate.kind == kind and candidate.keys <= row.keys() and candidate.matches(row):
            return candidate
    return None
