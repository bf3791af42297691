"""Dialogues in which a policy answers one turn after the other, each among its own earlier answers.

Ghost Attention samples its training dialogues so, and the test of what a model still recalls. All
dialogues take their turn together, so that a turn is one call of the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from llama2rt.data.records import Dialogue, Messages, Prompt
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.remote import Remote
from llama2rt.rollout.sampling import complete, derived_seed
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

Place = Literal["system", "message"]
"""where an instruction stands in the first turn: as the system message, or before the user's words
(for a chat template that knows no system message)"""

NO_ROOM = "no room in the context"
UNUSABLE = "an answer that is blank, or holds a tag or control token of the chat format"


@dataclass(frozen=True)
class Turns:
    """What the user says in each turn, and under which system message."""

    users: tuple[str, ...]
    system: str = ""
    given: tuple[str, ...] = ()
    """answers to the first turns, which are not sampled"""

    @classmethod
    def of(cls, dialogue: Dialogue) -> Self:
        """A finished dialogue, with all of its answers but the last given."""
        system, *rest = dialogue.messages
        if system["role"] != "system":
            system, rest = {"content": ""}, dialogue.messages
        users = tuple(message["content"] for message in rest[::2])
        return cls(users, system["content"], tuple(m["content"] for m in rest[1:-1:2]))

    def first(self, turns: int) -> Self:
        """Only so many turns."""
        return replace(self, users=self.users[:turns], given=self.given[: turns - 1])

    def sampled(self) -> Self:
        """No answer is given."""
        return replace(self, given=())

    def opened(self, instruction: str, place: Place) -> Self:
        """With an instruction in the first turn alone."""
        if place == "message":
            return replace(self, users=(f"{instruction} {self.users[0]}", *self.users[1:]))
        system = f"{instruction}\n{self.system}" if self.system else instruction
        return replace(self, system=system)

    def repeated(self, instruction: str) -> Self:
        """With an instruction before the user's words in every turn."""
        return replace(self, users=tuple(f"{instruction} {user}" for user in self.users))

    def messages(self, answers: Sequence[str]) -> Messages:
        """The dialogue as far as it is answered, and then what the user says next, if anything."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn, user in enumerate(self.users[: len(answers) + 1]):
            said.append({"role": "user", "content": user})
            if turn < len(answers):
                said.append({"role": "assistant", "content": answers[turn]})
        return said


@dataclass
class Answered:
    """The answers to a dialogue's turns, given ones first."""

    answers: list[str] = field(default_factory=list)
    cut: int = 0
    """sampled answers that ended at the length limit, without an EOS"""
    ended: str = ""
    """why there are no further answers, if there are fewer than turns or the last one is unusable:
    `NO_ROOM` or `UNUSABLE`"""


def answer(
    engine: Engine | Remote,
    dialogues: Sequence[Turns],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[Answered]:
    """Answers to every turn of each dialogue, in order. One whose next prompt leaves less than
    `max_tokens` in the context ends there, and one with an answer that cannot stand in a dialogue
    ends with it. A cut answer stands as it is. All ranks take part, and have them all."""
    found = [Answered() for _ in dialogues]
    context = engine.model.config.context
    for turn in range(max((len(dialogue.users) for dialogue in dialogues), default=0)):
        asked: list[tuple[int, Prompt]] = []
        for i, (dialogue, so_far) in enumerate(zip(dialogues, found, strict=True)):
            if so_far.ended or turn >= len(dialogue.users):
                continue
            if turn < len(dialogue.given):
                so_far.answers.append(dialogue.given[turn])
                continue
            messages = dialogue.messages(so_far.answers)
            if len(chat.encode_prompt(engine.tokenizer, messages)) + max_tokens > context:
                so_far.ended = NO_ROOM
            else:
                asked.append((i, Prompt(str(i), messages)))
        if not asked:
            continue
        completions = complete(
            engine,
            [prompt for _, prompt in asked],
            temperature=temperature,
            max_tokens=max_tokens,
            seed=derived_seed(seed, "turn", turn),
        )
        for (i, prompt), completion in zip(asked, completions, strict=True):
            found[i].answers.append(completion.text)
            found[i].cut += completion.finish_reason != "stop"
            if not _can_stand(engine.tokenizer, prompt.messages, completion.text):
                found[i].ended = UNUSABLE
    return found


def _can_stand(tokenizer: Tokenizer, messages: Messages, answer: str) -> bool:
    try:
        chat.encode_dialogue(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    except InputError:
        return False
    return True
