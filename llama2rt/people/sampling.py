"""Pairs of responses, sampled by one thread while people judge: first for those who wait, then some
ahead of being asked for.

What is to be sampled stands in the store, so that a server that was killed goes on with it.
"""

import concurrent.futures
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llama2rt.data.records import Messages
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.commands import Opening
from llama2rt.generate.remote.client import Client
from llama2rt.people.config import Config, Variant
from llama2rt.people.tasks import Task, Tasks

logger = logging.getLogger("llama2rt.people.sampling")

_AT_ONCE = 8
_ATTEMPTS = 3
_TRIES_OF_A_REQUEST = 2  # the thread tries again by itself
_SECONDS_BETWEEN_TRIES = 5.0
_SECONDS_OF_STOPPING = 5.0
# Of one task's two responses, in all attempts.
_SEEDS_OF_A_TASK = 16


class Answerer(Protocol):
    """One variant."""

    def answer(self, prompts: Sequence[Messages], seeds: Sequence[int]) -> list[str | None]:
        """A response to each prompt, None where it was cut. InputError for a prompt that cannot be
        answered, OSError where nothing answers for now."""
        ...


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
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
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
                engines[variant.model] = Opening().engine(variant.model, at_once=_AT_ONCE)
            # Two temperatures of one model draw apart.
            engine = engines[variant.model]
            found[variant.name] = EngineAnswerer(engine, variant, config.seed + number)
    return found


class Sampler:
    """The thread. `trouble` says why nothing is sampled for now, where something should be."""

    def __init__(self, tasks: Tasks, variants: Mapping[str, Answerer], ahead: int) -> None:
        self._tasks, self._variants, self._ahead = tasks, variants, ahead
        self.trouble: str | None = None
        self._wanted = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it after what it samples now. Where that takes long, it ends with the process: what
        was to be sampled stands in the store."""
        self._stopping = True
        self._wanted.set()
        self._thread.join(_SECONDS_OF_STOPPING)

    def wake(self) -> None:
        """There may be something to sample."""
        self._wanted.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wanted.clear()
            try:
                worked = self.step()
                self.trouble = None
            except Exception as error:  # whatever it is: people go on judging what is there
                self.trouble = f"{type(error).__name__}: {error}"
                logger.warning("sampling: %s", self.trouble)
                worked = False
            if not worked and not self._stopping:
                self._wanted.wait(_SECONDS_BETWEEN_TRIES)

    def step(self) -> bool:
        """Sample what is wanted now, up to a few; whether anything was. OSError where a server does
        not answer."""
        wanted = self._tasks.waiting(_AT_ONCE, self._ahead)
        if not wanted:
            return False
        try:
            self._sample(wanted)
        except InputError:
            for task in wanted:
                self._sample_alone(task)
        return True

    def _sample_alone(self, task: Task) -> None:
        try:
            self._sample([task])
        except InputError as error:
            self._tasks.failed(task.id, str(error).removeprefix("prompt 0: "))

    def _sample(self, tasks: Sequence[Task]) -> None:
        texts: dict[int, list[str | None]] = {task.id: list(task.responses) for task in tasks}
        for side in (0, 1):
            for name, answerer in self._variants.items():
                asked = [
                    task
                    for task in tasks
                    if task.variants[side] == name and texts[task.id][side] is None
                ]
                if asked:
                    seeds = [_SEEDS_OF_A_TASK * t.id + 2 * t.attempts + side for t in asked]
                    answers = answerer.answer([task.prompt.messages for task in asked], seeds)
                    for task, answer in zip(asked, answers, strict=True):
                        texts[task.id][side] = answer
        for task in tasks:
            self._settle(task, texts[task.id])

    def _settle(self, task: Task, texts: Sequence[str | None]) -> None:
        first, second = texts
        if unknown := [
            name
            for name, text in zip(task.variants, task.responses, strict=True)
            if text is None and name not in self._variants
        ]:
            self._tasks.failed(task.id, f"no variant is called {unknown[0]!r} any more")
        elif (problem := _problem(first, second)) is None:
            self._tasks.answered(task.id, (str(first), str(second)))
        elif task.attempts + 1 < _ATTEMPTS:
            self._tasks.again(task.id)
        else:
            self._tasks.failed(task.id, problem)


def _problem(first: str | None, second: str | None) -> str | None:
    """Why two responses are no pair to show."""
    if first is None or second is None:
        return "a response was longer than it may be"
    if not first or not second:
        return "a response was empty"
    if "\0" in first + second:  # which no record holds
        return "a response held a null character"
    return "the two responses were the same" if first == second else None
