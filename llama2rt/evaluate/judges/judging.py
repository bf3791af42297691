"""One face for all judges: two answers side by side, and which of them is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llama2rt.data.records import Messages
from llama2rt.evaluate.judges.cache import Cache


@dataclass(frozen=True)
class Question:
    """Two answers to a conversation, in the order in which they are shown."""

    messages: Messages
    first: str
    second: str
    kind: str = "helpfulness"

    def swapped(self) -> "Question":
        """The same answers in the other order."""
        return Question(self.messages, self.second, self.first, self.kind)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a question."""

    first: float
    """preference for the first answer in [0, 1], 0.5 a tie"""
    readable: bool = True
    """False where its reply names no side; it then counts as a tie"""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Judge(Protocol):
    """Compares two answers. Equal ones are never shown to it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """reward, preference, model, server or people"""
        ...

    @property
    def ordered(self) -> bool:
        """Whether the order of the answers could matter, so that it is asked in both."""
        ...

    @property
    def requests(self) -> int:
        """Sent to a server so far."""
        ...

    def check(self, questions: Sequence[Question]) -> None:
        """InputError for what it could not judge, before weights are loaded."""
        ...

    def verdicts(self, questions: Sequence[Question], cache: Cache) -> list[Verdict]:
        """Of each question, those that the cache lacks asked for."""
        ...
