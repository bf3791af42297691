"""The variants that answer when they are asked: models in this process, and servers."""

import concurrent.futures
import json
import os
from collections.abc import Sequence
from pathlib import Path

from llama2rt.data.records import Messages
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.commands import Opening
from llama2rt.generate.remote.client import Client
from llama2rt.people.config import Config, Variant
from llama2rt.people.sampling import AT_ONCE, Answerer

_TRIES_OF_A_REQUEST = 2  # the sampler's thread tries again by itself


class EngineAnswerer:
    """A model in this process."""

    def __init__(self, engine: Engine, variant: Variant, seed: int) -> None:
        self._engine, self._variant, self._seed = engine, variant, seed

    def answer(self, prompts: Sequence[Messages], seeds: Sequence[int]) -> list[str | None]:
        """See `Answerer`; a response depends on prompt and seed alone."""
        variant = self._variant
        completions = self._engine.generate(
            prompts,
            temperature=variant.temperature,
            top_p=variant.top_p,
            max_tokens=variant.max_tokens,
            seed=self._seed,
            indices=seeds,
        )
        return [c.text.strip() if c.finish_reason == "stop" else None for c in completions]


class ServerAnswerer:
    """A server of OpenAI's API, which is asked in the chat format alone: it need not hold a model
    of this project's."""

    def __init__(self, variant: Variant) -> None:
        assert variant.server is not None
        self._variant = variant
        key = os.environ.get("LLAMA2RT_API_KEY")
        self._client = Client(variant.server, api_key=key, attempts=_TRIES_OF_A_REQUEST)
        self._name = variant.server_model or self._listed()

    def answer(self, prompts: Sequence[Messages], seeds: Sequence[int]) -> list[str | None]:
        """See `Answerer`."""
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._ask, prompts, seeds))

    def _listed(self) -> str:
        listed = self._client.get("/v1/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise InputError(f"variants: {self._client.url} lists no model") from None

    def _ask(self, messages: Messages, seed: int) -> str | None:
        variant = self._variant
        asked = {
            "model": self._name,
            "messages": messages,
            "temperature": variant.temperature,
            "top_p": variant.top_p,
            "max_tokens": variant.max_tokens,
            "seed": seed,
        }
        reply = self._client.post("/v1/chat/completions", asked)
        try:
            choice = reply["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            found = json.dumps(reply)[:200]
            raise InputError(
                f"{self._client.url}: expected a chat completion, got {found}"
            ) from None
        return text.strip() if reason == "stop" and isinstance(text, str) else None


def answerers(config: Config) -> dict[str, Answerer]:
    """The variants that answer when they are asked, by name. InputError for a model that cannot be
    loaded or a server that refuses, OSError for one that does not answer."""
    engines: dict[Path, Engine] = {}
    found: dict[str, Answerer] = {}
    for number, variant in enumerate(config.variants):
        if variant.server is not None:
            found[variant.name] = ServerAnswerer(variant)
        elif variant.model is not None:
            if variant.model not in engines:
                engines[variant.model] = Opening().engine(variant.model, at_once=AT_ONCE)
            # Two temperatures of one model draw apart.
            engine = engines[variant.model]
            found[variant.name] = EngineAnswerer(engine, variant, config.seed + number)
    return found
