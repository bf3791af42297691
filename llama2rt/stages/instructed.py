"""The dialogues that Ghost Attention trains on: a policy answers them with an instruction in every
user message, and the first turn alone keeps it.
"""

import functools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama2rt import atomic
from llama2rt.data import instructions
from llama2rt.data.instructions import Instruction
from llama2rt.data.records import Dialogue, Messages
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.remote import Remote
from llama2rt.parallel import on_main
from llama2rt.rollout import turns
from llama2rt.rollout.sampling import derived_seed
from llama2rt.rollout.turns import Answered, Turns

if TYPE_CHECKING:
    from llama2rt.stages.ghost_attention import GhostAttentionRecipe

logger = logging.getLogger("llama2rt.stages.ghost_attention")

DIALOGUES_PER_FILE = 256
CUT = "a cut answer"
NOT_FOLLOWED = "a last answer that does not follow"


@dataclass(frozen=True)
class Asked:
    """A dialogue as it is to be asked."""

    turns: Turns
    """without the instruction, as far as it is asked"""
    instruction: Instruction


@dataclass(frozen=True)
class Instructed:
    """What became of it."""

    dialogue: Dialogue | None
    """the instruction in the first turn alone, the last answer alone to be learned; None where it
    is left out"""
    plain: Messages
    """the same messages without the instruction"""
    follows: dict[str, bool]
    """whether the last answer does, by attribute that a rule can check"""
    left_out: str = ""
    """why"""


def asked(recipe: "GhostAttentionRecipe", dialogues: Sequence[Dialogue], part: str) -> list[Asked]:
    """An instruction for each dialogue, and how far it is asked: both drawn from the seed and the
    dialogue's number. Dialogues of fewer than `least_turns` are left out and counted."""
    known = [Turns.of(dialogue) for dialogue in dialogues]
    long = [dialogue for dialogue in known if len(dialogue.users) >= recipe.least_turns]
    if len(long) < len(known):
        left_out = len(known) - len(long)
        logger.warning(
            "%d %s dialogues of fewer than %d turns left out", left_out, part, recipe.least_turns
        )
    told = instructions.draw(
        instructions.read(recipe.attributes),
        len(long),
        derived_seed(recipe.seed, part, "instructions"),
        terse=recipe.terse,
    )
    found = []
    for index, (dialogue, instruction) in enumerate(zip(long, told, strict=True)):
        rng = np.random.default_rng([derived_seed(recipe.seed, part, "turns"), index])
        count = int(rng.integers(recipe.least_turns, len(dialogue.users) + 1))
        found.append(Asked(dialogue.first(count), instruction))
    return found


def sample(
    recipe: "GhostAttentionRecipe", engine: Engine | Remote, folder: Path, items: Sequence[Asked]
) -> list[Instructed]:
    """What the engine's policy makes of each item. Written to `folder` by rank 0 in files of 256 as
    they are finished; a file that is there is read instead of sampled again, so that a killed run
    loses at most one."""
    found: list[Instructed] = []
    for part, begin in enumerate(range(0, len(items), DIALOGUES_PER_FILE)):
        group = items[begin : begin + DIALOGUES_PER_FILE]
        path = folder / f"part-{part:05d}.jsonl"
        if not on_main(path.exists):
            answered = turns.answer(
                engine,
                [_repeated(recipe, item) for item in group],
                temperature=recipe.temperature,
                max_tokens=recipe.sampling.max_tokens,
                seed=derived_seed(recipe.seed, folder.name, part),
            )
            on_main(functools.partial(_write, path, group, answered))
        lines = on_main(functools.partial(_read, path))
        found += [
            _instructed(recipe, item, answers) for item, answers in zip(group, lines, strict=True)
        ]
    return found


def _repeated(recipe: "GhostAttentionRecipe", item: Asked) -> Turns:
    own = item.turns if recipe.history == "given" else item.turns.sampled()
    return own.repeated(item.instruction.full_text)


def _write(path: Path, group: Sequence[Asked], answered: Sequence[Answered]) -> None:
    """What was asked and answered, a line a dialogue."""
    lines = [
        json.dumps(
            {
                **item.instruction.to_json(),
                "answers": answers.answers,
                "cut": answers.cut,
                "ended": answers.ended,
            },
            ensure_ascii=False,
        )
        for item, answers in zip(group, answered, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, "".join(f"{line}\n" for line in lines))


def _read(path: Path) -> list[Answered]:
    found = []
    # Not splitlines(): an answer may hold any of Unicode's other line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            found.append(Answered(row["answers"], row["cut"], row["ended"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a line of this stage ({error!r})") from None
    return found


def _instructed(recipe: "GhostAttentionRecipe", item: Asked, answers: Answered) -> Instructed:
    follows = item.instruction.follows(answers.answers[-1]) if answers.answers else {}
    reason = answers.ended or (CUT if answers.cut else "")
    if not reason and recipe.followed_only and not all(follows.values()):
        reason = NOT_FOLLOWED
    plain = item.turns.messages(answers.answers)
    if reason:
        return Instructed(None, plain, follows, reason)
    opened = item.turns.opened(item.instruction.text, recipe.place)
    learned = (*(False for _ in answers.answers[1:]), True)
    messages = opened.messages(answers.answers)
    dialogue = Dialogue(messages, learned=None if len(learned) == 1 else learned)
    return Instructed(dialogue, plain, follows)


def kept(items: Sequence[Instructed], part: str) -> list[Dialogue]:
    """The dialogues that are not left out; says how many are. InputError where none is kept."""
    reasons = Counter(item.left_out for item in items if item.left_out)
    for reason, count in reasons.items():
        logger.warning("%d %s dialogues left out: %s", count, part, reason)
    found = [item.dialogue for item in items if item.dialogue is not None]
    if not found:
        said = ", ".join(f"{count} for {reason}" for reason, count in reasons.items())
        raise InputError(f"no {part} dialogue is left to use: {said}")
    return found


def account(items: Sequence[Instructed]) -> dict[str, Any]:
    """What became of the dialogues, in numbers."""
    checked = [item.follows for item in items if item.dialogue is not None and item.follows]
    return {
        "asked": len(items),
        "kept": sum(item.dialogue is not None for item in items),
        "left_out": dict(Counter(item.left_out for item in items if item.left_out)),
        "last_answer_follows": (
            sum(all(follows.values()) for follows in checked) / len(checked) if checked else None
        ),
    }
