"""What a format is, the list of them that the modules beside this one fill, and which of them a row
is in.

No order of precedence decides: a row that two formats could claim is refused, because the keys that
only the other one reads would be lost, and `format = "..."` settles it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llama2rt.data.formats.values import finished
from llama2rt.errors import InputError

Row = dict[str, Any]
Convert = Callable[[Row], Iterator[Row]]

OWN = "llama2rt"
"""what `format` calls our own form"""


@dataclass
class Selection:
    """Which pairs and answers of one file are wanted, and counts of the others."""

    minimum_score_difference: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)
    """by reason"""
    unsupported: int = 0
    """pairs that are kept although their own scores are equal or say the opposite"""

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
    """A published format of rows."""

    name: str
    kind: str
    """of the records that it gives"""
    keys: frozenset[str]
    """that a row must have"""
    matches: Callable[[Row], bool]
    """what else must hold of a row with these keys"""
    unless: frozenset[str]
    """keys that make a row another format's: it is read in this one only where `format` says so"""
    start: Start
    """makes a fresh converter for one file: some remember earlier rows"""
    reads: Callable[[Row], Iterable[str]]
    """further keys of a row that the converter looks at"""
    carries: frozenset[str]
    """keys of published rows that no record needs"""
    decides: frozenset[str]
    """our own keys that only the format itself can give: a row that sets one contradicts it"""
    scores: frozenset[str] | None
    """further keys read for `Selection.minimum_score_difference`; None where it does not apply"""

    @property
    def key(self) -> str:
        """What `format` calls it: its name in lower case, words joined by hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def claims(self, row: Row) -> bool:
        """Whether `row` could be in this format."""
        return self.keys <= row.keys() and not self.unless & row.keys() and self.matches(row)

    def require(self, row: Row) -> None:
        """InputError unless `row`, which is said to be in this format, can be."""
        for key in sorted(self.keys - row.keys()):
            found = ", ".join(sorted(map(str, row))) or "none"
            raise InputError(f"format {self.key!r}: missing key {key!r} (keys found: {found})")
        if not self.matches(row):
            raise InputError(f"format {self.key!r}: the row's values are not those of {self.name}")

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
    matches: Callable[[Row], bool] = lambda row: True,
    *,
    unless: str = "messages",
    reads: str | Callable[[Row], Iterable[str]] = "",
    carries: str = "",
    decides: str = "",
    scores: str | None = None,
) -> Callable[[Start], Start]:
    """Adds a format to `FORMATS`. Keys are given as one text, with spaces between them."""
    sets = {"keys": keys, "unless": unless, "carries": carries, "decides": decides}

    def add(start: Start) -> Start:
        FORMATS.append(
            Format(
                name,
                kind,
                matches=matches,
                start=start,
                reads=(lambda _row: reads.split()) if isinstance(reads, str) else reads,
                scores=None if scores is None else frozenset(scores.split()),
                **{key: frozenset(text.split()) for key, text in sets.items()},
            )
        )
        return start

    return add


def stateless(convert: Convert) -> Start:
    """Makes of a converter without memory and selection what `register` takes."""
    return lambda _selection: convert


def selecting(convert: Callable[[Row, Selection], Iterator[Row]]) -> Start:
    """The same for a converter that leaves out some of a row's answers or pairs."""
    return lambda selection: lambda row: convert(row, selection)


def recognise(row: Row, kind: str) -> Format | None:
    """The foreign format of `kind` that `row` is in; None for our own form. InputError where more
    than one could claim it."""
    claims = [found for found in FORMATS if found.kind == kind and found.claims(row)]
    names = [(found.name, found.key) for found in claims]
    if claims and _could_be_own(row, kind):
        names.insert(0, ("our own form", OWN))
    if len(names) > 1:
        said = " and ".join(name for name, _ in names)
        keys = " or ".join(f'format = "{key}"' for _, key in names)
        raise InputError(f"the row could be in {said}: say which by {keys}")
    return claims[0] if claims else None


def _could_be_own(row: Row, kind: str) -> bool:
    """Whether a row that a foreign format claims is in our own form too. Dialogues cannot be: no
    format claims one that has `messages`."""
    if kind == "comparison":
        answers = (row.get("chosen"), row.get("rejected"))
        return isinstance(row.get("prompt"), list) and all(isinstance(a, str) for a in answers)
    said = row.get("messages")
    return kind == "prompt" and "id" in row and isinstance(said, list) and not finished(said)


def named(key: str, kind: str) -> Format | None:
    """The format of records of `kind` that is called `key`; None for our own form. InputError for
    any other key, with those that there are."""
    if key == OWN:
        return None
    known = {found.key: found for found in FORMATS if found.kind == kind}
    if key not in known:
        expected = ", ".join([OWN, *sorted(known)])
        raise InputError(f"format {key!r}: not one of {kind}s; expected one of {expected}")
    return known[key]
