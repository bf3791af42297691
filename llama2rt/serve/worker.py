"""The one thread that owns the engine: requests of all clients go through it, step by step.

Handlers run on the event loop and never touch the session. They send commands through a queue,
which the thread reads between two steps; what a step has sampled goes back in one call of the
loop. So a slow client delays nobody, and one that leaves frees its pages before the next step.
"""

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama2rt.errors import InputError
from llama2rt.generate import Engine, SamplingOptions, Statistics, Update
from llama2rt.generate.engine import Prompt

Command = Callable[[], None]
Result = TypeVar("Result")


class EngineStopped(RuntimeError):
    """The engine's thread has ended; the message says why."""


@dataclass(eq=False)
class Answers:
    """All sequences of one HTTP request. `add` makes one; `close` it in any case."""

    worker: "Worker"
    arriving: "asyncio.Queue[tuple[int, Update] | Exception]" = field(default_factory=asyncio.Queue)
    ids: dict[int, int] = field(default_factory=dict)
    """the session's id of each unfinished sequence and its index; the worker thread's"""
    open: int = 0
    """sequences not yet finished; the event loop's"""

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(index of the sequence, what a step gave it) until all are finished. What ended the
        worker is raised."""
        while self.open:
            arrived = await self.arriving.get()
            if isinstance(arrived, Exception):
                raise arrived
            if arrived[1].finish_reason:
                self.open -= 1
                self.worker.open -= 1
            yield arrived

    def close(self) -> None:
        """Give back what is left unfinished, with its pages."""
        if self.open:
            self.worker.open -= self.open
            self.open = 0
            self.worker.send(lambda: self.worker.abort(self))


class Worker:
    """Steps one session of `engine` as long as anything is unfinished in it. InputError where the
    engine's `cache_bytes` holds no session."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.session = engine.session()
        self.open = 0
        """sequences that were accepted and are not finished; the event loop's"""
        self.statistics: Statistics = self.session.statistics
        """of the last step"""
        self.failure: BaseException | None = None
        """what ended the thread, where something did"""
        self.on_failure: Callable[[], None] = lambda: None
        """called on the event loop when the thread has ended by `failure`"""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._calls: set[asyncio.Future[Any]] = set()  # not yet answered; the event loop's
        self._answers: dict[int, Answers] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step; what is unfinished ends with it."""
        self.send(self._stop)
        await asyncio.to_thread(self._thread.join)

    def send(self, command: Command) -> None:
        """Have `command` called by the thread before its next step, in order."""
        self._commands.put(command)

    async def add(self, prompts: Sequence[Prompt], options: SamplingOptions, n: int) -> Answers:
        """`n` sequences of each prompt, those of the first prompt first. InputError where the
        session takes one of them not; then none is left in it."""
        answers = Answers(self, open=len(prompts) * n)
        self.open += answers.open
        try:
            await self.call(lambda: self._add(answers, prompts, options, n))
        except BaseException:
            answers.close()
            raise
        return answers

    def abort(self, answers: Answers) -> None:
        """Take what is left of these out of the session; the worker thread's."""
        for identifier in answers.ids:
            self.session.abort(identifier)
            del self._answers[identifier]
        answers.ids.clear()
        self.statistics = self.session.statistics

    def _add(
        self, answers: Answers, prompts: Sequence[Prompt], options: SamplingOptions, n: int
    ) -> None:
        try:
            for index, prompt in enumerate(prompts):
                for sample in range(n):
                    identifier = self.session.add(prompt, options, sample=sample)
                    answers.ids[identifier] = index * n + sample
                    self._answers[identifier] = answers
        except InputError:
            self.abort(answers)
            raise

    async def call(self, function: Callable[[], Result]) -> Result:
        """What `function`, called by the thread between two steps, returns or raises."""
        if self.failure is not None:
            raise self._stopped()
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls.add(done)
        done.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                outcome: Callable[[], None] = functools.partial(done.set_result, function())
            except Exception as error:
                outcome = functools.partial(done.set_exception, error)
            self._call(lambda: None if done.done() else outcome())

        self.send(run)
        return await done

    def _run(self) -> None:
        try:
            with self.session:
                while not self._stopping:
                    self._obey()
                    if not self._stopping and self.session.unfinished:
                        self._deliver(self.session.step())
        except BaseException as error:  # whatever it is, no client may wait for ever
            self.failure = error
            self._call(self._fail)

    def _stopped(self) -> EngineStopped:
        return EngineStopped(f"the engine has stopped: {self.failure}")

    def _obey(self) -> None:
        """All commands that there are; where nothing runs, wait for one."""
        if not self.session.unfinished:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _deliver(self, updates: Sequence[Update]) -> None:
        self.statistics = self.session.statistics
        arrived = []
        for update in updates:
            answers = self._answers.get(update.id)
            if answers is None:
                continue  # aborted: nobody waits for it
            arrived.append((answers, (answers.ids[update.id], update)))
            if update.finish_reason:
                del self._answers[update.id], answers.ids[update.id]

        def put() -> None:
            for answers, item in arrived:
                answers.arriving.put_nowait(item)

        self._call(put)

    def _stop(self) -> None:
        self._stopping = True

    def _fail(self) -> None:
        for answers in set(self._answers.values()):
            answers.arriving.put_nowait(self._stopped())
        for call in tuple(self._calls):
            if not call.done():
                call.set_exception(self._stopped())
        self.on_failure()

    def _call(self, act: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(act)
        except RuntimeError:
            self._stopping = True  # the loop is closed: nobody is left to answer
