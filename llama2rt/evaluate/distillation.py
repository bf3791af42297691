"""What a safety pre-prompt did to a policy's answers, and what of them is kept (section 4.2.4)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llama2rt.evaluate import intervals
from llama2rt.rollout.responses import Response

# Of the score of the answer without a pre-prompt. Fig. 16b: where it is low, distillation helps
# most, and where it is high, it may do harm.
BINS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Outcome:
    """The two answers to one adversarial prompt."""

    original: Response
    """without a pre-prompt"""
    answer: Response | None
    """with one; None where none was finished"""
    preprompt: str
    tailored: bool
    """whether it held the answer template of the prompt's risk category"""

    @property
    def kept(self) -> bool:
        """Whether the safety reward model scores the answer higher."""
        return self.answer is not None and self.answer.reward > self.original.reward

    @property
    def gain(self) -> float:
        """Difference of the safety scores in (0, 1); 0 where there is no answer to compare."""
        if self.answer is None:
            return 0.0
        return self.answer.scores["safety"] - self.original.scores["safety"]

    def to_json(self) -> dict[str, Any]:
        """Both answers with their scores; keys without a value are left out."""
        prompt = self.original.prompt
        row = {
            "prompt_id": prompt.id,
            "messages": prompt.messages,
            "risk_category": prompt.risk_category,
            "attack_vector": prompt.attack_vector,
            "preprompt": self.preprompt,
            "tailored": self.tailored,
            "original": self.original.text,
            "original_scores": self.original.scores,
            "answer": self.answer.text if self.answer else None,
            "answer_scores": self.answer.scores if self.answer else None,
            "kept": self.kept,
        }
        return {key: value for key, value in row.items() if value not in ("", None)}


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What became of the answers: `unfinished`, how many prompts got none to compare, and rows
    `distilled` of all prompts, then by risk category, attack vector, kind of pre-prompt, and score
    without one. A row has `by` and `value`, how many `prompts`, the share `kept`, the mean scores
    `original` and `answer` of the safety reward model, and the mean `gain` among what is kept (None
    where nothing is), with intervals."""
    groups: list[tuple[str, Callable[[Outcome], str]]] = [
        ("risk category", lambda o: o.original.prompt.risk_category),
        ("attack vector", lambda o: o.original.prompt.attack_vector),
        ("pre-prompt", lambda o: "tailored" if o.tailored else "generic"),
        ("score without", _bin),
    ]
    rows = [_row("all", "", outcomes)]
    for name, of in groups:
        values = sorted({of(outcome) for outcome in outcomes})
        if values == [""]:
            continue  # no prompt says it
        rows += [
            _row(name, value or "none", [o for o in outcomes if of(o) == value]) for value in values
        ]
    unfinished = sum(outcome.answer is None for outcome in outcomes)
    return {"prompts": len(outcomes), "unfinished": unfinished, "distilled": rows}


def _row(by: str, value: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    compared = [o for o in outcomes if o.answer is not None]
    kept = [o for o in compared if o.kept]
    return {
        "by": by,
        "value": value,
        "prompts": len(outcomes),
        "kept": intervals.wilson(len(kept), len(outcomes))._asdict(),
        "original": _mean(o.original.scores["safety"] for o in outcomes),
        "answer": _mean(o.answer.scores["safety"] for o in compared if o.answer),
        "gain": _mean(o.gain for o in kept),
    }


def _mean(values: Iterable[float]) -> dict[str, float] | None:
    found = list(values)
    return intervals.bootstrap(found)._asdict() if found else None


def _bin(outcome: Outcome) -> str:
    score = outcome.original.scores["safety"]
    high = next(high for high in BINS if score <= high)
    low = BINS[BINS.index(high) - 1] if high > BINS[0] else 0.0
    return f"{low:.2f} to {high:.2f}"
