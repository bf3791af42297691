"""What filters leave out: how many, and the first few of each by FILE:LINE."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from llama2rt.data.json_values import printable
from llama2rt.errors import InputError

EXAMPLES = 3
"""kept of each filter"""
LONGEST_REASON = 300
"""characters of an example's reason, which may quote the record"""


class Removed:
    """Counts and examples of what the `active` filters leave out, by the filter's name."""

    def __init__(self, active: Iterable[str] = ()) -> None:
        self.active = frozenset(active)
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def activate(self, names: Iterable[str]) -> None:
        """Further filters that are on."""
        self.active |= frozenset(names)

    def add(self, name: str, where: str, reason: str) -> None:
        """One more that the filter `name` leaves out; `where`: its FILE:LINE."""
        self.counts[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{where}: {printable(reason, LONGEST_REASON)}")

    def takes(self, error: InputError, where: str) -> bool:
        """Whether one of the filters leaves out what `error` is about, which is counted then."""
        if error.fault is None or error.fault not in self.active:
            return False
        self.add(error.fault, where, str(error))
        return True

    def update(self, other: "Removed") -> None:
        """Add what `other` has counted."""
        self.activate(other.active)
        for name, count in other.counts.items():
            self.counts[name] += count
            examples = [*self.examples.get(name, []), *other.examples[name]]
            self.examples[name] = examples[:EXAMPLES]

    def report(self) -> dict[str, Any]:
        """{filter: {"removed": count, "examples": [...]}} of each active filter, JSON-able."""
        return {
            name: {"removed": self.counts[name], "examples": self.examples.get(name, [])}
            for name in sorted(self.active)
        }

    def lines(self) -> list[str]:
        """What was left out, for people: a line a filter, its examples below it."""
        found = []
        for name, count in sorted(self.counts.items()):
            found.append(f"filters.{name}: {count:,} left out")
            found += [f"  {example}" for example in self.examples[name]]
        return found
