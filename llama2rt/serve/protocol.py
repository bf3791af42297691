"""Requests of OpenAI's completions and chat completions, read strictly.

A field is honoured, or refused by name; the few that only label a request are read, counted and
change nothing. `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids` and `return_token_ids` are
named as vLLM's extra fields. Source: OpenAI's API reference, completions and chat.
"""

import secrets
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from llama2rt.generate import SamplingOptions
from llama2rt.serve.bodies import describe
from llama2rt.serve.errors import ApiError

MOST_TOP_LOGPROBS = 20
_INT32_MAX = 2**31 - 1

# They label a request, or say how the service may keep it.
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
# Field -> the values, besides null, that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    """a last chunk that counts tokens"""


class Request(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    most_stop: ClassVar[int] = 16

    model: str | None = None
    """the served model's name, or none"""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=_INT32_MAX)
    """0 or -1: from all"""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    n: int = Field(default=1, ge=1, le=_INT32_MAX)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """None draws one"""
    stop: list[str] = Field(default=[], max_length=most_stop)
    stop_token_ids: list[int] = Field(default=[], max_length=most_stop)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """the ids of prompt and answer besides their text"""

    _without_effect: list[str] = PrivateAttr(default=[])

    @model_validator(mode="wrap")
    @classmethod
    def _fields(cls, given: Any, handler: Any) -> Self:
        """Null is a field that is not there."""
        if not isinstance(given, dict):
            return handler(given)
        kept = {name: value for name, value in given.items() if value is not None}
        labels = sorted(WITHOUT_EFFECT & kept.keys())
        for name in labels:
            del kept[name]
        for name, neutral in UNSUPPORTED.items():
            if name not in kept or name in cls.model_fields:
                continue
            value = kept.pop(name)
            if not any(value == other for other in neutral):
                raise ApiError(
                    400, f"{name}: this server does not do it, got {describe(value)}", param=name
                )
        request: Self = handler(kept)
        request._without_effect = labels
        return request

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, given: list[str]) -> list[str]:
        if "" in given:
            raise ValueError("a stop string may not be empty")
        return given

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream = true")
        return self

    @property
    def without_effect(self) -> list[str]:
        """Names of the fields that were read and change nothing."""
        return self._without_effect

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, max_tokens: int, logprobs: int) -> SamplingOptions:
        """As the engine takes them; `logprobs`: alternatives a token."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        same = ("temperature", "top_p", "min_p", "repetition_penalty")
        return SamplingOptions(
            **{name: getattr(self, name) for name in same},
            top_k=max(0, self.top_k),
            stop=tuple(self.stop),
            stop_ids=tuple(self.stop_token_ids),
            max_tokens=max_tokens,
            seed=seed,
            logprobs=logprobs,
        )


class CompletionRequest(Request):
    """`POST /v1/completions`: continue texts, or token ids, as they are."""

    prompt: list[str | list[int]]
    """texts, which begin with a BOS, or token ids, which are taken as they are"""
    max_tokens: int = Field(default=16, ge=1, le=_INT32_MAX)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        """OpenAI's four forms as one: a text, texts, ids, lists of ids."""
        if isinstance(given, str):
            return [given]
        if not isinstance(given, list) or not given:
            raise ValueError("expected text, token ids, or a list of either that is not empty")
        if isinstance(given[0], int):
            given = [given]
        for one in given:
            if isinstance(one, str):
                continue
            if not isinstance(one, list) or not all(
                isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _INT32_MAX for i in one
            ):
                raise ValueError("expected texts or lists of token ids")
        return given


class ChatRequest(Request):
    """`POST /v1/chat/completions`: answer the last message, in the model's chat format."""

    messages: list[dict[str, str]]
    max_tokens: int | None = Field(default=None, ge=1, le=_INT32_MAX)
    """None for what the context leaves"""
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT32_MAX)
    """OpenAI's newer name of max_tokens"""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_TOP_LOGPROBS)

    @field_validator("messages", mode="before")
    @classmethod
    def _text_messages(cls, given: Any) -> Any:
        """Contents in parts become one text; a developer is the system."""
        if not isinstance(given, list) or not given:
            raise ValueError("expected a list of messages that is not empty")
        return [_message(one, index) for index, one in enumerate(given)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs = true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens: expected one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens


class WeightsRequest(BaseModel):
    """`POST /update_weights_from_disk`, as SGLang has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model_path: str


def _message(given: Any, index: int) -> dict[str, str]:
    if not isinstance(given, dict):
        raise ValueError(f"message {index}: expected an object with role and content")
    message = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(map(str, message.keys() - {"role", "content"})):
        raise ValueError(f"message {index}: this server does not read {', '.join(unknown)}")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, index) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"message {index}: expected role and content as text")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(given: Any, index: int) -> str:
    if not isinstance(given, dict) or given.get("type") != "text":
        kind = given.get("type") if isinstance(given, dict) else given
        raise ValueError(f"message {index}: this model reads text, got {describe(kind)}")
    if set(given) != {"type", "text"} or not isinstance(given["text"], str):
        raise ValueError(f"message {index}: expected a part of type and text")
    return given["text"]
