"""What an annotator sees and says (section 3.2.1): two answers to one prompt, side by side; which
of them is better, by how much, and in safety batches which of the two are safe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llama2rt.data.records import Comparison, Prompt

Side = Literal["first", "second"]


@dataclass(frozen=True)
class AnswerPair:
    """Two different answers to `prompt`, stripped, in the order in which they are shown."""

    id: str
    """its own among all batches: another policy's answers to the same prompt are another pair"""
    prompt: Prompt
    first: str
    second: str

    def to_json(self) -> dict[str, Any]:
        """A line of the file that people judge from."""
        said = {"risk_category": self.prompt.risk_category}
        said |= {"attack_vector": self.prompt.attack_vector}
        return {
            "id": self.id,
            "prompt_id": self.prompt.id,
            "kind": self.prompt.kind,
            **{key: value for key, value in said.items() if value},
            "messages": self.prompt.messages,
            "first": self.first,
            "second": self.second,
        }


@dataclass(frozen=True)
class Judgement:
    """What an annotator said of a pair."""

    chosen: Side
    rating: str | None = None
    """one of `data.records.RATINGS`; None where the annotator gives none"""
    first_safe: bool | None = None
    second_safe: bool | None = None
    """None where safety was not judged"""

    def comparison(self, pair: AnswerPair, source: str) -> Comparison | None:
        """The record it makes of `pair`; None for a chosen answer that is unsafe beside one that is
        safe, which the paper leaves out of its data (section 3.2.1)."""
        answers = {
            "first": (pair.first, self.first_safe),
            "second": (pair.second, self.second_safe),
        }
        other: Side = "second" if self.chosen == "first" else "first"
        (chosen, chosen_safe), (rejected, rejected_safe) = answers[self.chosen], answers[other]
        safety = None
        if chosen_safe is not None and rejected_safe is not None:
            if not chosen_safe and rejected_safe:
                return None
            safety = "chosen_safe" if chosen_safe and not rejected_safe else "both_safe"
            if not chosen_safe:
                safety = "both_unsafe"
        return Comparison(
            pair.prompt.messages, chosen, rejected, self.rating, safety, pair.prompt.kind, source
        )


class Annotator(Protocol):
    """Anyone, or anything, that compares."""

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> Sequence[Judgement | None]:
        """A judgement of each of `pairs`, in their order; None where there is none, such as for a
        pair that cannot be decided. `seed` is that of the recipe and the part; the same pairs and
        seed must give the same judgements, so that a killed run resumes to the same data."""
        ...
