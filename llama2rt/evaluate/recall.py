"""Does a model still follow the first turn's instruction, many turns later?

The multi-turn test of Ghost Attention (Llama 2, appendix A.3.5, Table 30: recall at turns 2, 4, 6
and 20). The model answers every turn of a dialogue whose first turn alone holds the instruction,
among its own earlier answers; an answer recalls where it follows all attributes of its instruction
that a rule can check. The paper's was a judgement of people on a few dialogues; this is a rule's.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llama2rt.data import instructions
from llama2rt.data.instructions import Attribute, Instruction
from llama2rt.errors import InputError
from llama2rt.evaluate.intervals import wilson
from llama2rt.generate import Engine
from llama2rt.generate.remote import Remote
from llama2rt.rollout import turns as rollout
from llama2rt.rollout.sampling import derived_seed
from llama2rt.rollout.turns import Answered, Place, Turns
from llama2rt.run import check_integers


class RecallOptions(BaseModel):
    """What is asked, and when it is looked whether the instruction is still followed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    turns: list[int] = Field(default=[2, 4, 6, 20], min_length=1)
    """turns that are looked at (Table 30)"""
    limit: int = Field(default=200, ge=0)
    """most held-out dialogues that are answered; 0 for no test"""
    temperature: float = Field(default=1.0, ge=0)

    @field_validator("turns")
    @classmethod
    def _rising(cls, turns: list[int]) -> list[int]:
        if turns[0] < 1 or turns != sorted(set(turns)):
            raise ValueError(f"expected turns from 1 on, rising, got {turns}")
        return turns

    @model_validator(mode="after")
    def _integers(self) -> "RecallOptions":
        check_integers(self)
        return self


def questions(dialogues: Sequence[Turns], options: RecallOptions) -> list[Turns]:
    """The first of the dialogues that have as many turns as are looked at, as far as the last of
    those. InputError where there is none."""
    last = options.turns[-1]
    long = [dialogue for dialogue in dialogues if len(dialogue.users) >= last]
    if not long:
        most = max((len(dialogue.users) for dialogue in dialogues), default=0)
        raise InputError(
            f"recall.turns: {last}: no held-out dialogue has so many turns (most: {most}); lower "
            "it, or recall.limit = 0 for no test"
        )
    return [dialogue.first(last) for dialogue in long[: options.limit]]


def draw(attributes: Sequence[Attribute], count: int, seed: int) -> list[Instruction]:
    """`count` instructions to test with. InputError where no attribute has a check."""
    checked = [a for a in attributes if a.check is not None or all(v.check for v in a.values)]
    if not checked:
        raise InputError("recall: no attribute has a check, so that no rule can say what is kept")
    return instructions.draw(checked, count, derived_seed(seed, "recall"))


def measure(
    engine: Engine | Remote,
    dialogues: Sequence[Turns],
    told: Sequence[Instruction],
    options: RecallOptions,
    *,
    place: Place,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """`table` of what the engine's model answers to all turns of the dialogues, told the first turn
    an instruction each. All ranks take part, and have it."""
    opened = [
        dialogue.sampled().opened(instruction.text, place)
        for dialogue, instruction in zip(dialogues, told, strict=True)
    ]
    answered = rollout.answer(
        engine, opened, temperature=options.temperature, max_tokens=max_tokens, seed=seed
    )
    return table(answered, told, options.turns)


def table(
    answered: Sequence[Answered], told: Sequence[Instruction], turns: Sequence[int]
) -> dict[str, Any]:
    """{turns: rows, ended: number of dialogues by reason}. A row is {turn, dialogues, mean, low,
    high, attributes}: the share of the dialogues that got there whose answer follows all checked
    attributes, with Wilson's 95 % interval, and the same of each attribute by name."""
    rows = []
    for turn in turns:
        verdicts = [
            instruction.follows(dialogue.answers[turn - 1])
            for dialogue, instruction in zip(answered, told, strict=True)
            if len(dialogue.answers) >= turn
        ]
        if not verdicts:
            continue
        names = sorted({name for verdict in verdicts for name in verdict})
        rows.append(
            {
                "turn": turn,
                **_share([all(verdict.values()) for verdict in verdicts]),
                "attributes": {
                    name: _share([verdict[name] for verdict in verdicts if name in verdict])
                    for name in names
                },
            }
        )
    ended = Counter(dialogue.ended for dialogue in answered if dialogue.ended)
    return {"turns": rows, "ended": dict(ended)}


def _share(followed: Sequence[bool]) -> dict[str, Any]:
    return {"dialogues": len(followed), **wilson(sum(followed), len(followed))._asdict()}


def describe(name: str, found: dict[str, Any]) -> str:
    """`table`'s result as lines for a terminal."""
    lines = [f"{name}: answers that follow the first turn's instruction"]
    for row in found["turns"]:
        parts = [
            f"{attribute} {100 * share['mean']:.0f} %"
            for attribute, share in row["attributes"].items()
        ]
        lines.append(
            f"  turn {row['turn']:>3}: {100 * row['mean']:5.1f} % [{100 * row['low']:.1f}, "
            f"{100 * row['high']:.1f}] of {row['dialogues']}  ({', '.join(parts)})"
        )
    lines += [f"  {count} dialogues ended early: {why}" for why, count in found["ended"].items()]
    return "\n".join(lines)
