"""How servers of OpenAI's API differ where it matters to a sampler: what a prompt may be, who says
which tokens were drawn, and what happens to a field that the server does not know.

A completion is asked for by token ids, so that nobody else's chat template or BOS comes between; a
server that reads text alone gets the messages, and its count of the prompt's tokens is compared.
Everything that a server would otherwise take from the model's generation_config.json is said
explicitly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama2rt.errors import InputError
from llama2rt.generate.remote.client import Client
from llama2rt.text import chat


@dataclass(frozen=True)
class Ask:
    """`n` answers to one prompt."""

    prompt: Any
    """token ids or messages"""
    tokens: list[int]
    """the prompt's"""
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int


@dataclass
class Answer:
    """One answer: its tokens with the EOS that ended it, and their log-probabilities, or None where
    the server does not give them all."""

    tokens: list[int]
    logprobs: list[float] | None
    added: int = 0
    """1 where the EOS was not among the server's tokens but in its finish reason"""
    exact: bool = True
    """whether the server said the tokens; otherwise they are what its text encodes to"""


@dataclass(frozen=True)
class Dialect:
    """One kind of server."""

    ids: bool = True
    """whether a prompt may be token ids"""
    extras: bool = True
    """whether it knows top_k, min_p, repetition_penalty and stop_token_ids"""
    no_top_k: int = 0
    """the top_k that means all tokens"""
    asks_ids: Mapping[str, Any] = field(default_factory=dict)
    """fields that make it give the answer's ids"""
    logprobs: int = 0
    """the least that makes a completion give the drawn tokens' log-probabilities"""
    at_temperature: bool = False
    """whether those are known to be at the sampling temperature"""

    def request(self, ask: Ask, model: str, tokenizer: Any) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        if not self.ids:
            return _chat_request(ask, model, tokenizer)
        body = {
            "model": model,
            "prompt": ask.tokens,
            "n": ask.n,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "max_tokens": ask.max_tokens,
            "seed": ask.seed,
            "logprobs": self.logprobs,
            **self.asks_ids,
        }
        if self.extras:
            body["top_k"] = ask.top_k or self.no_top_k
            body |= {"min_p": 0.0, "repetition_penalty": 1.0}
            body["stop_token_ids"] = list(tokenizer.stop_ids)
        elif ask.top_k:
            raise InputError("top_k: OpenAI's API has none, and this server is of no known kind")
        return "/v1/completions", body

    def answers(self, reply: Any, ask: Ask, tokenizer: Any) -> list[Answer]:
        """The answers in a reply, by their index. InputError where it is not OpenAI's shape or
        counts other tokens of the prompt."""
        try:
            choices = sorted(reply["choices"], key=lambda choice: int(choice.get("index", 0)))
            counted = (reply.get("usage") or {}).get("prompt_tokens")
            shown = {tuple(c["prompt_token_ids"]) for c in choices if c.get("prompt_token_ids")}
            found = [_answer(choice, ask, tokenizer) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the reply is not an OpenAI completion ({error!r}): {str(reply)[:200]}"
            ) from None
        if counted is not None and counted != len(ask.tokens):
            raise InputError(
                f"the server counts {counted} tokens of the prompt, here are {len(ask.tokens)}: "
                "its tokenizer or chat template is another"
            )
        if shown - {tuple(ask.tokens)}:
            raise InputError("the server answered other prompt tokens than it was given")
        return found


DIALECTS = {
    "llama2rt": Dialect(asks_ids={"return_token_ids": True}, at_temperature=True),
    "vllm": Dialect(asks_ids={"return_token_ids": True}),
    "sglang": Dialect(no_top_k=-1),
    # Its completions give log-probabilities in the shape of chats, with ids, from one on.
    "llamacpp": Dialect(logprobs=1, asks_ids={"return_tokens": True}),
    "transformers": Dialect(ids=False),
    "openai": Dialect(extras=False, logprobs=1),
}


def of_server(client: Client, name: str | None, kind: str) -> tuple[str, Dialect]:
    """The model's name at the server and the server's kind. InputError where it has no such model,
    several and none is named, or is of no known kind."""
    if kind not in ("auto", *DIALECTS):
        raise InputError(f"kind: expected auto or one of {', '.join(DIALECTS)}, got {kind!r}")
    listed = client.get("/v1/models")
    try:
        owners = {str(m["id"]): str(m.get("owned_by")) for m in listed["data"]}
    except (KeyError, TypeError):
        raise InputError(f"{client.url}/v1/models: not OpenAI's list of models") from None
    if kind == "auto":
        kind = _kind(client, owners)
    if name is None:
        if len(owners) != 1:
            known = ", ".join(owners) or "none"
            raise InputError(f"name: {client.url} has several models or none ({known}); name one")
        name = next(iter(owners))
    elif name not in owners and kind != "transformers":  # which lists what it has loaded
        raise InputError(f"name: {client.url} has {', '.join(owners) or 'none'}, not {name!r}")
    return name, DIALECTS[kind]


def _kind(client: Client, owners: Mapping[str, str]) -> str:
    for owner in owners.values():
        if owner in DIALECTS and owner != "openai":
            return owner
    try:
        paths = client.get("/openapi.json")["paths"]
    except (InputError, KeyError, TypeError):
        return "openai"
    return "transformers" if {"/load_model", "/reset"} <= paths.keys() else "openai"


def _chat_request(ask: Ask, model: str, tokenizer: Any) -> tuple[str, dict[str, Any]]:
    """For `transformers serve`, which drops n and logprobs without a word, refuses top_k, and
    samples only if the model's generation_config.json says so: all of it is in `generation_config`,
    which replaces that file."""
    config: dict[str, Any] = {
        "max_new_tokens": ask.max_tokens,
        "do_sample": ask.temperature > 0,
        "eos_token_id": list(tokenizer.stop_ids),
        "bos_token_id": tokenizer.bos,
        "pad_token_id": tokenizer.pad_candidate(),
    }
    if ask.temperature > 0:
        config |= {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": ask.top_k}
    body = {"model": model, "seed": ask.seed, "generation_config": json.dumps(config)}
    if not isinstance(ask.prompt[0], Mapping):
        # It decodes a continuation alone, which loses the space in front of its first word.
        raise InputError("token ids: transformers serve can only be asked by messages")
    messages = [dict(message) for message in ask.prompt]
    return "/v1/chat/completions", {**body, "messages": messages}


def _answer(choice: Mapping[str, Any], ask: Ask, tokenizer: Any) -> Answer:
    finish = choice["finish_reason"]
    if finish not in ("stop", "length"):
        raise InputError(f"the server ended an answer with {finish!r}")
    ids, logprobs = choice.get("token_ids"), None
    said = choice.get("logprobs") or {}
    if said.get("content") is not None:  # a chat's shape
        logprobs = [entry.get("logprob") for entry in said["content"]]
        if ids is None and all("id" in entry for entry in said["content"]):
            ids = [entry["id"] for entry in said["content"]]
    elif said.get("token_logprobs") is not None:
        logprobs = list(said["token_logprobs"])
    if ids is None and choice.get("tokens"):
        ids = choice["tokens"]
    if ids is None:
        return Answer(_retokenised(choice, ask, tokenizer, finish), None, exact=False)
    tokens = [int(token) for token in ids]
    if logprobs is not None and (len(logprobs) != len(tokens) or None in logprobs):
        logprobs = None
    if finish == "stop" and (not tokens or tokens[-1] not in tokenizer.stop_ids):
        return Answer([*tokens, tokenizer.eos], None, added=1)
    return Answer(tokens, logprobs)


def _retokenised(choice: Mapping[str, Any], ask: Ask, tokenizer: Any, finish: str) -> list[int]:
    """The tokens of an answer that came as text: those that its text encodes to, which a model may
    have written in other pieces."""
    text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
    if isinstance(ask.prompt[0], Mapping):
        every, _ = chat.encode_response(tokenizer, ask.prompt, text)
        tokens = every[len(ask.tokens) :]
        while tokens and tokens[-1] in tokenizer.stop_ids:
            tokens.pop()
    else:
        before = tokenizer.decode(ask.tokens)
        every = tokenizer.encode(before + text, bos=True)
        if every[: len(ask.tokens)] != ask.tokens:
            raise InputError("the server's text joins the prompt's last token; ask by messages")
        tokens = every[len(ask.tokens) :]
    return [*tokens, tokenizer.eos] if finish == "stop" else tokens
