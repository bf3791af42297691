"""What a person sees while a run goes on: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama2rt.parallel import is_main

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """`with ProgressLine("sft", steps, done) as line: line.update(step, "loss 1.23")`; stderr.

    Ranks other than 0 show nothing.
    """

    def __init__(self, name: str, steps: int, done: int, stream: TextIO | None = None) -> None:
        self._name, self._steps, self._first = name, steps, done
        self._stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        self._shown = is_main()
        if self._shown and self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(name, total=steps, completed=done, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, text: str) -> None:
        """Show `done` steps of all and `text`; on a log at most every ten seconds and at the
        end."""
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
            return
        if not self._shown:
            return
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and done < self._steps:
            return
        self._last = now
        left = (now - self._start) / max(1, done - self._first) * (self._steps - done)
        print(
            f"{self._name} {done}/{self._steps} {text} {_clock(left)} left",
            file=self._stream,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
