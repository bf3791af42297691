"""A judge that is asked in words: any speaker, by a prompt that it answers with a label.

The prompt is this project's (`rollout.judge`), or a file of the user's:

    name = "strict"
    system = "You compare answers."
    user = "{conversation} [1] {first} [2] {second} Which one is better: [[1]], [[2]] or [[0]]?"
    [labels]
    "[[1]]" = 1.0
    "[[2]]" = 0.0
    "[[0]]" = 0.5
"""

import math
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llama2rt.data.records import Messages
from llama2rt.errors import InputError
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.judging import Question, Verdict
from llama2rt.evaluate.judges.speakers import Options, Reply, Speaker, replies
from llama2rt.rollout import judge

_FIELDS = {"conversation", "first", "second", "quality"}
ALTERNATIVES = 20
"""most that OpenAI's API gives"""


class Template(BaseModel):
    """What a judge is asked, and what its reply means."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = "letters"
    system: str | None = None
    """its system message"""
    user: str = judge.QUESTION
    """with {conversation}, {first}, {second} and, if wanted, {quality}: what counts on a prompt of
    this kind"""
    labels: dict[str, float] = Field(default={})
    """preference for the first answer by label; the label that stands last in a reply counts. None
    for the letters A and B, alone in the reply"""

    @field_validator("user")
    @classmethod
    def _fields(cls, user: str) -> str:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(user) if name is not None}
        except ValueError as error:
            raise ValueError(f"{error}; a brace that is one is written twice") from None
        if unknown := named - _FIELDS:
            raise ValueError(f"no such field: {min(unknown)!r} (known: {', '.join(_FIELDS)})")
        if missing := {"conversation", "first", "second"} - named:
            raise ValueError(f"lacks {{{min(missing)}}}")
        return user

    @field_validator("labels")
    @classmethod
    def _preferences(cls, labels: dict[str, float]) -> dict[str, float]:
        for label, preference in labels.items():
            if not label or not 0 <= preference <= 1:
                raise ValueError(f"{label!r}: expected text and a preference in [0, 1]")
        if labels and not {0.0, 1.0} <= set(labels.values()):
            raise ValueError("expected a label for 1, the first answer, and one for 0, the second")
        return labels

    def messages(self, question: Question) -> Messages:
        """What the judge is asked."""
        turns = (f"{m['role']}: {m['content']}" for m in question.messages)
        content = self.user.format(
            conversation="\n".join(turns),
            first=question.first,
            second=question.second,
            quality=judge.QUALITY[question.kind],
        )
        asked = [{"role": "user", "content": content}]
        return (
            asked if self.system is None else [{"role": "system", "content": self.system}, *asked]
        )

    def read(self, reply: str) -> float | None:
        """The preference for the first answer; None for a reply that says none."""
        if not self.labels:
            return judge.read(reply)
        # Of two labels at one place, one begins like the other: the longer one is meant.
        at = {label: (reply.rfind(label), len(label)) for label in self.labels}
        last = max(at, key=at.__getitem__)
        return self.labels[last] if at[last][0] >= 0 else None


def template(path: Path) -> Template:
    """The template in a TOML file; InputError with the file and the line or key."""
    try:
        return Template.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None


@dataclass(frozen=True)
class Asking:
    """How a judge's reply is drawn."""

    max_tokens: int | None = None
    """None for a letter's length, or 1024 where a template's labels may follow an explanation"""
    graded: bool = False
    """take, in place of the letter that it writes, its probability of A against B as first token
    (AlpacaEval 2 weighs so), from a server that gives log-probabilities"""
    seed: int = 0


class SpeakingJudge:
    """Asks a speaker by a template, at temperature 0."""

    kind, ordered = "server", True

    def __init__(
        self, speaker: Speaker, asked: Template | None = None, how: Asking | None = None
    ) -> None:
        """InputError for labels that are graded."""
        self._template, how = asked or Template(), how or Asking()
        if how.graded and self._template.labels:
            raise InputError("graded: reads the letters A and B; a template's labels are no tokens")
        self.name = speaker.name
        self._speaker, self._graded = speaker, how.graded
        most = how.max_tokens or (1024 if self._template.labels else judge.REPLY_TOKENS)
        if how.graded:
            self._options = Options(0.0, 1, how.seed, ALTERNATIVES)
        else:
            self._options = Options(0.0, most, how.seed)

    @property
    def requests(self) -> int:
        return self._speaker.requests

    def check(self, questions: Sequence[Question]) -> None:
        """See `Judge`: a server says itself what is too long for it."""

    def verdicts(self, questions: Sequence[Question], cache: Cache) -> list[Verdict]:
        """See `Judge`."""
        asked = [self._template.messages(question) for question in questions]
        return [
            self._verdict(reply) for reply in replies(self._speaker, asked, self._options, cache)
        ]

    def _verdict(self, reply: Reply) -> Verdict:
        first = _graded(reply.first) if self._graded else self._template.read(reply.text)
        used = reply.prompt_tokens, reply.completion_tokens
        return Verdict(0.5 if first is None else first, first is not None, *used)


def _graded(alternatives: Mapping[str, float]) -> float | None:
    """P(A) / (P(A) + P(B)) over the tokens that say one of them; None where none does."""
    mass = dict.fromkeys("AB", 0.0)
    for token, logprob in alternatives.items():
        if (letter := token.strip()) in mass:
            mass[letter] += math.exp(logprob)
    total = sum(mass.values())
    return mass["A"] / total if total else None
