"""What each step did to the documents of a part of a source: counts, and the first few examples."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from llama2rt.data.json_values import printable
from llama2rt.data.removed import EXAMPLES, LONGEST_REASON, Removed

STEPS = (
    "empty",
    "language",
    "c4",
    "gopher",
    "gopher_repetition",
    "contamination",
    "personal_data",
    "duplicates",
    "near_duplicates",
)
"""that remove documents, in their order; a document is counted by the first that does"""
_COUNTS = ("read", "read_bytes", "kept", "kept_bytes", "tokens")


@dataclass
class Tally:
    """Of a chunk, or of all of a source."""

    read: int = 0
    """documents"""
    read_bytes: int = 0
    """of their text as UTF-8"""
    kept: int = 0
    kept_bytes: int = 0
    tokens: int = 0
    """with each document's BOS and EOS"""
    removed: Removed = field(default_factory=lambda: Removed(STEPS))
    changed: Counter[str] = field(default_factory=Counter)
    """documents whose text a step changed, by step"""
    personal: Counter[str] = field(default_factory=Counter)
    """items replaced, by kind"""
    personal_examples: list[str] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    """documents read, where languages are asked for"""
    keys: Counter[str] = field(default_factory=Counter)
    """of records, that nothing reads"""
    skipped: list[str] = field(default_factory=list)
    """bad records that were left out, by FILE:LINE"""

    def replaced(self, where: str, kinds: Counter[str], items: list[str]) -> None:
        """Personal data of a document."""
        self.personal += kinds
        self.changed["personal_data"] += 1
        if len(self.personal_examples) < EXAMPLES:
            # The report is read by more people than the text: no item stands in it whole.
            shown = ", ".join(f"{item[:2]}...{item[-2:]}" for item in items)
            self.personal_examples.append(f"{where}: {printable(shown, LONGEST_REASON)}")

    def update(self, other: "Tally") -> None:
        """Add what another part has counted."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.removed.update(other.removed)
        for name in ("changed", "personal", "languages", "keys"):
            getattr(self, name).update(getattr(other, name))
        self.personal_examples = [*self.personal_examples, *other.personal_examples][:EXAMPLES]
        self.skipped += other.skipped

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        removed = {n: c for n, c in self.removed.report().items() if c["removed"]}
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "removed": {name: removed[name] for name in STEPS if name in removed},
            "changed": dict(self.changed),
            "personal_data": dict(self.personal),
            "personal_data_examples": self.personal_examples,
            "languages": dict(self.languages.most_common()),
            "keys_not_used": dict(self.keys),
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Self:
        found = cls(**{name: given[name] for name in _COUNTS})
        for step, said in given["removed"].items():
            found.removed.counts[step] = said["removed"]
            found.removed.examples[step] = list(said["examples"])
        found.changed.update(given["changed"])
        found.personal.update(given["personal_data"])
        found.personal_examples = list(given["personal_data_examples"])
        found.languages.update(given["languages"])
        found.keys.update(given["keys_not_used"])
        found.skipped = list(given["skipped"])
        return found
