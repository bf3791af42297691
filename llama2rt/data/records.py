"""The five records that files hold and stages pass to each other, and what makes one valid.

`from_json` is strict about meaning (roles in turn, ratings by name, finite numbers, nothing
blank) and its messages name the key, so that a reader only adds FILE:LINE. Constructors do not
check: records made by the library itself are right by construction, and go through `from_json`
when they are read back. A null key is an absent key at every level, because Arrow's structs and
many writers spell it so. Keys that a record does not have are left to the reader, which counts
them, unless one looks like a misspelt key of ours.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from llama2rt.data.json_values import misspelt, shown, type_name, without_nulls
from llama2rt.errors import InputError, naming
from llama2rt.text.chat import check_messages

Messages = list[dict[str, str]]
Votes = list[dict[str, str]]

# Best first (section 3.2.1); "negligibly_better" is the paper's "negligibly better / unsure".
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
SAFETY = ("chosen_safe", "both_safe", "both_unsafe")
_EXCLUDED = "rejected_safe"
KINDS = ("helpfulness", "safety")
PREFERS = ("chosen", "rejected", "neither")


class _Record:
    optional: ClassVar[frozenset[str]]
    carried: ClassVar[frozenset[str]] = frozenset()
    """keys beside the record's own that our files hold for other readers"""
    within: ClassVar[frozenset[str]] = frozenset()
    """fields that are no keys of the object, because its messages hold them"""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object that `from_json` reads back; None and empty fields are left out."""
        return {
            key: value
            for key, value in asdict(self).items()  # type: ignore[call-overload]
            if key not in self.within
            and (key not in self.optional or value not in (None, "", {}, []))
        }

    @classmethod
    def from_json(cls, obj: Any) -> Self:
        """InputError naming the key, what was found and what is expected."""
        if not isinstance(obj, Mapping):
            raise InputError(f"expected a JSON object, got {type_name(obj)}")
        obj = without_nulls(obj)
        names = (f.name for f in fields(cls))  # type: ignore[arg-type]
        known = tuple(name for name in names if name not in cls.within)
        for key in obj.keys() - cls.carried:
            if key not in known and (meant := misspelt(key, known)) and meant not in obj:
                raise InputError(f"unknown key {key!r}: did you mean {meant!r}?")
        for key in known:
            if key not in cls.optional and key not in obj:
                found = ", ".join(sorted(map(str, obj))) or "none"
                raise InputError(f"missing key {key!r} (keys found: {found})")
        record = cls(**{key: obj[key] for key in known if key in obj})
        record._check()
        return record

    def _check(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Document(_Record):
    """A text to pretrain on."""

    text: str
    source: str = ""
    """name of the origin"""
    optional: ClassVar[frozenset[str]] = frozenset({"source"})

    def _check(self) -> None:
        _check_text("text", self.text)
        _check_text("source", self.source, blank=True)


@dataclass(frozen=True)
class Dialogue(_Record):
    """A finished conversation: the last message is the assistant's."""

    messages: Messages
    source: str = ""
    learned: tuple[bool, ...] | None = None
    """which of the assistant's messages are trained on, first to last; None for all. In files it is
    a message's `weight`, 1 (the default) or 0, as OpenAI's fine-tuning API has it"""
    optional: ClassVar[frozenset[str]] = frozenset({"source"})
    within: ClassVar[frozenset[str]] = frozenset({"learned"})

    def to_json(self) -> dict[str, Any]:
        record = super().to_json()
        if self.learned is not None:
            answers = (m for m in record["messages"] if m["role"] == "assistant")
            for message, learned in zip(answers, self.learned, strict=True):
                if not learned:
                    message["weight"] = 0
        return record

    @classmethod
    def from_json(cls, obj: Any) -> Self:
        messages = obj.get("messages") if isinstance(obj, Mapping) else None
        if not isinstance(messages, list) or not any(map(_has_weight, messages)):
            return super().from_json(obj)
        plain, learned = _without_weights(messages)
        record = super().from_json({**obj, "messages": plain})
        return record if learned is None else replace(record, learned=learned)

    def _check(self) -> None:
        _check_messages("messages", self.messages, "assistant")
        _check_text("source", self.source, blank=True)


@dataclass(frozen=True)
class Prompt(_Record):
    """A conversation to be answered."""

    id: str
    messages: Messages
    kind: str = "helpfulness"
    """one of `KINDS`; in RLHF the safety reward model ranks the answers to a safety prompt"""
    risk_category: str = ""
    """what an adversarial prompt could bring about (section 4.2.1); of a helpfulness prompt, what
    it only seems to ask for"""
    attack_vector: str = ""
    """how an adversarial prompt asks for it"""
    optional: ClassVar[frozenset[str]] = frozenset({"kind", "risk_category", "attack_vector"})

    def _check(self) -> None:
        _check_text("id", self.id)
        _check_messages("messages", self.messages, "user")
        _check_choice("kind", self.kind, KINDS)
        _check_text("risk_category", self.risk_category, blank=True)
        _check_text("attack_vector", self.attack_vector, blank=True)


@dataclass(frozen=True)
class Comparison(_Record):
    """Two answers to one prompt, one of them preferred (section 3.2.1)."""

    prompt: Messages
    chosen: str
    rejected: str
    rating: str | None = None
    """one of `RATINGS`: how much better the chosen answer is"""
    safety: str | None = None
    """one of `SAFETY`"""
    kind: str = "helpfulness"
    """one of `KINDS`: what the answers were compared by"""
    source: str = ""
    rater: str = ""
    """who made this judgement, where one person did"""
    votes: Votes = field(default_factory=list)
    """one object a rater, where several judged the pair: `prefers`, one of `PREFERS`, and, where
    they are known, `rater`, `rating`, and `safety`, which speaks of the answer that this rater
    prefers and of the other. `votes.consensus` decides by them; nothing else here does"""
    optional: ClassVar[frozenset[str]] = frozenset(
        {"rating", "safety", "kind", "source", "rater", "votes"}
    )

    def _check(self) -> None:
        _check_messages("prompt", self.prompt, "user")
        _check_answer("chosen", self.chosen)
        _check_answer("rejected", self.rejected)
        if self.chosen.strip() == self.rejected.strip():
            raise InputError("chosen and rejected are equal", "identical_responses")
        if self.rating is not None:
            _check_choice("rating", self.rating, RATINGS)
        if self.safety == _EXCLUDED:
            raise InputError(
                f"safety: {_EXCLUDED}, the chosen answer unsafe and the other safe: such pairs are "
                "excluded (section 3.2.1)",
                "unsafe_chosen",
            )
        if self.safety is not None:
            _check_choice("safety", self.safety, SAFETY)
        _check_choice("kind", self.kind, KINDS)
        _check_text("source", self.source, blank=True)
        _check_text("rater", self.rater, blank=True)
        _check_votes(self.votes)
        if self.rater and self.votes:
            raise InputError("rater: a record with votes names its raters there")


@dataclass(frozen=True)
class Sample(_Record):
    """A policy's answer to a prompt."""

    prompt_id: str
    messages: Messages
    response: str
    """empty where the policy gave only EOS"""
    scores: dict[str, float] = field(default_factory=dict)
    """by reward model"""
    reward: float | None = None
    """what the scores were combined to"""
    policy: str = ""
    """name of the version that answered"""
    temperature: float | None = None
    seed: int | None = None
    kind: str = ""
    """the prompt's, with the next two; empty where the sample does not say"""
    risk_category: str = ""
    attack_vector: str = ""
    optional: ClassVar[frozenset[str]] = frozenset(
        {"scores", "reward", "policy", "temperature", "seed"}
        | {"kind", "risk_category", "attack_vector"}
    )
    carried: ClassVar[frozenset[str]] = frozenset({"prompt_tokens", "tokens", "finished"})

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        response: str,
        *,
        policy: str = "",
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Self:
        """An answer to `prompt`, of which it says all."""
        answer = cls(
            prompt.id,
            prompt.messages,
            response,
            policy=policy,
            temperature=temperature,
            seed=seed,
        )
        return replace(
            answer,
            kind=prompt.kind,
            risk_category=prompt.risk_category,
            attack_vector=prompt.attack_vector,
        )

    @property
    def turn(self) -> int:
        """Which of the user's turns it answers, from 1."""
        return sum(message["role"] == "user" for message in self.messages)

    def _check(self) -> None:
        _check_text("prompt_id", self.prompt_id)
        _check_messages("messages", self.messages, "user")
        _check_text("response", self.response, blank=True)
        if not isinstance(self.scores, dict):
            raise InputError(f"scores: expected an object of numbers, got {type_name(self.scores)}")
        for name, score in self.scores.items():
            _check_text("scores: a name", name, blank=True)
            _check_number(f"scores.{name}", score)
        if self.reward is not None:
            _check_number("reward", self.reward)
        _check_text("policy", self.policy, blank=True)
        if self.temperature is not None:
            _check_number("temperature", self.temperature)
            if self.temperature < 0:
                raise InputError(f"temperature: expected at least 0, got {self.temperature}")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise InputError(f"seed: expected an integer, got {type_name(self.seed)}")
        if self.kind:
            _check_choice("kind", self.kind, KINDS)
        _check_text("risk_category", self.risk_category, blank=True)
        _check_text("attack_vector", self.attack_vector, blank=True)


Record = Document | Dialogue | Prompt | Comparison | Sample
RECORDS: dict[str, type[Record]] = {
    "document": Document,
    "dialogue": Dialogue,
    "prompt": Prompt,
    "comparison": Comparison,
    "sample": Sample,
}


def _check_text(key: str, value: Any, blank: bool = False) -> None:
    if not isinstance(value, str):
        raise InputError(f"{key}: expected text, got {type_name(value)}")
    if "\0" in value:
        raise InputError(f"{key}: holds a null character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{key}: lone surrogate at character {error.start}") from None
    if not blank and not value.strip():
        raise InputError(f"{key} is blank")


def _check_answer(key: str, value: Any) -> None:
    _check_text(key, value, blank=True)
    if not value.strip():
        raise InputError(f"{key} is blank", "empty_turns")


def _check_messages(key: str, value: Any, last: str) -> None:
    if not isinstance(value, list):
        raise InputError(f"{key}: expected a list of messages, got {type_name(value)}")
    for index, message in enumerate(value):
        if isinstance(message, Mapping) and not isinstance(message.get("content", ""), str):
            found = type_name(message["content"])
            raise InputError(f"{key}: message {index + 1} content: expected text, got {found}")
    with naming(key):
        check_messages(value, last=last)
    for index, message in enumerate(value):
        _check_text(f"{key}: message {index + 1} content", message["content"])


def _has_weight(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("weight") is not None


def _without_weights(messages: list[Any]) -> tuple[list[Any], tuple[bool, ...] | None]:
    """(messages without their weights, which of the assistant's are learned: None where all are).
    InputError for a weight that is neither 0 nor 1, on a message that is never learned, or 0 on all
    that could be."""
    plain: list[Any] = []
    learned: list[bool] = []
    for number, message in enumerate(messages, start=1):
        weight = 1
        if _has_weight(message):
            where = f"messages: message {number} weight"
            if message.get("role") != "assistant":
                raise InputError(f"{where}: only the assistant's messages are learned")
            weight = message["weight"]
            if isinstance(weight, bool) or weight not in (0, 1):
                raise InputError(f"{where}: expected 0 or 1, got {shown(weight)}")
            message = {key: value for key, value in message.items() if key != "weight"}
        plain.append(message)
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            learned.append(weight == 1)
    if learned and not any(learned):
        raise InputError("messages: every weight is 0, which leaves nothing to learn")
    return plain, None if all(learned) else tuple(learned)


def _check_votes(votes: Any) -> None:
    if not isinstance(votes, list):
        raise InputError(f"votes: expected a list of objects, got {type_name(votes)}")
    for number, vote in enumerate(votes, start=1):
        where = f"votes: item {number}"
        if not isinstance(vote, Mapping):
            raise InputError(f"{where}: expected an object, got {type_name(vote)}")
        if extra := vote.keys() - {"rater", "prefers", "rating", "safety"}:
            raise InputError(f"{where}: unknown keys {', '.join(sorted(map(str, extra)))}")
        if "prefers" not in vote:
            raise InputError(f"{where}: missing key 'prefers'")
        _check_choice(f"{where} prefers", vote["prefers"], PREFERS)
        _check_text(f"{where} rater", vote.get("rater", ""), blank=True)
        for key, choices in (("rating", RATINGS), ("safety", SAFETY)):
            if key in vote:
                _check_choice(f"{where} {key}", vote[key], choices)
        if vote["prefers"] == "neither":
            if "rating" in vote:
                raise InputError(f"{where} rating: a vote for neither has none")
            if vote.get("safety") == "chosen_safe":
                raise InputError(f"{where} safety: a vote for neither does not say which is safe")


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}: expected a number, got {type_name(value)}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond every float; its digits would fill the screen
        raise InputError(f"{key}: a number too large to hold") from None
    if not finite:
        raise InputError(f"{key}: expected a finite number, got {value}")


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        found = repr(value) if isinstance(value, str) else shown(value)
        raise InputError(f"{key}: expected one of {', '.join(choices)}; got {found}")
