"""Pairs of responses, sampled by one thread while people judge: first for those who wait, then some
ahead of being asked for.

What is to be sampled stands in the store, so that a server that was killed goes on with it.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from llama2rt.data.records import Messages
from llama2rt.errors import InputError
from llama2rt.people.tasks import Task, Tasks

logger = logging.getLogger("llama2rt.people.sampling")

AT_ONCE = 8
"""most tasks that are sampled together"""
_ATTEMPTS = 3
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
        wanted = self._tasks.waiting(AT_ONCE, self._ahead)
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
