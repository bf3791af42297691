"""Answers in OpenAI's shapes, whole or as a stream's chunks.

Source: OpenAI's API reference, completions and chat completions, objects and chunks.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2rt.generate import Update
from llama2rt.text.tokenizer import Tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


class Pieces:
    """Texts of single tokens, as logprobs name them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        tokenizer = self._tokenizer
        if token >= tokenizer.vocab_size:  # a vocabulary that is padded for speed
            return f"<{token}>"
        piece = tokenizer.piece(token)
        if token in tokenizer.hidden_ids:
            return piece
        # Alone it would lose the space in front: it is what it adds to a text.
        if piece.startswith(_SPACE):
            return piece.replace(_SPACE, " ")
        return tokenizer.decode([token])


@dataclass
class Choice:
    """One sequence as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Sequence[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.top += update.top or [[] for _ in update.tokens]
        self.finish_reason = update.finish_reason or None


@dataclass
class Shape:
    """How one request is answered: `kind` "chat" or "completion"."""

    kind: str
    model: str
    pieces: Pieces
    prompts: Sequence[Sequence[int]]
    n: int
    logprobs: bool
    token_ids: bool
    include_usage: bool = False

    def __post_init__(self) -> None:
        chat = self.kind == "chat"
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._offsets = [0] * (len(self.prompts) * self.n)
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one object."""
        chat = self.kind == "chat"
        shown = []
        for index, choice in enumerate(choices):
            text = choice.text
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            shown.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._logprobs(index, choice),
                    "finish_reason": choice.finish_reason,
                    **self._ids(index, choice),
                }
            )
        tokens = sum(len(choice.tokens) for choice in choices)
        head = self._head("chat.completion" if chat else "text_completion")
        return {**head, "choices": shown, "usage": self.usage(tokens)}

    def chunk(self, index: int, update: Update) -> dict[str, Any]:
        """What one step adds to the answer of sequence `index`."""
        chat = self.kind == "chat"
        added = Choice()
        added.add(update)
        if chat:
            said: dict[str, Any] = {"delta": {"content": added.text} if added.text else {}}
            if index not in self._begun:
                said["delta"] = {"role": "assistant", "content": added.text}
        else:
            said = {"text": added.text}
        ids = self._ids(index, added)
        if index in self._begun:
            ids.pop("prompt_token_ids", None)
        self._begun.add(index)
        shown = {
            "index": index,
            **said,
            "logprobs": self._logprobs(index, added),
            "finish_reason": added.finish_reason,
            **ids,
        }
        usage = {"usage": None} if self.include_usage else {}
        head = self._head("chat.completion.chunk" if chat else "text_completion")
        return {**head, "choices": [shown], **usage}

    def last_chunk(self, tokens: int) -> dict[str, Any]:
        """The chunk that counts, for those who asked for it."""
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        """OpenAI counts a prompt once, however many answers it gets."""
        asked = sum(map(len, self.prompts))
        return {
            "prompt_tokens": asked,
            "completion_tokens": tokens,
            "total_tokens": asked + tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _ids(self, index: int, choice: Choice) -> dict[str, Any]:
        if not self.token_ids:
            return {}
        prompt = self.prompts[index // self.n]
        return {"token_ids": choice.tokens, "prompt_token_ids": list(prompt)}

    def _logprobs(self, index: int, choice: Choice) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        names = [self.pieces[token] for token in choice.tokens]
        if self.kind == "chat":
            rows = zip(names, choice.logprobs, choice.top, strict=True)
            return {
                "content": [
                    {
                        **_named(name, logprob),
                        "top_logprobs": [_named(self.pieces[i], value) for i, value in top],
                    }
                    for name, logprob, top in rows
                ],
                "refusal": None,
            }
        offsets = []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": choice.logprobs,
            "top_logprobs": [{self.pieces[i]: value for i, value in top} for top in choice.top],
            "text_offset": offsets,
        }


def _named(name: str, logprob: float) -> dict[str, Any]:
    """A token of a chat's logprobs. `bytes` null: part of a character, which its text does not
    tell."""
    whole = "\N{REPLACEMENT CHARACTER}" not in name
    return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if whole else None}


def event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
