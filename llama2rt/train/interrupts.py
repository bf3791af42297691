"""Signals that ask a run to stop: all ranks stop after the same step, having saved.

SIGINT (Ctrl-C) says that a person has had enough, SIGTERM and SIGUSR1 that a scheduler wants the
machine back. The one ends with status 1, the others with 75, EX_TEMPFAIL of sysexits.h: the work is
saved, the same command may be queued again (`RequeueExit=75` of Slurm, `REQUEUE_EXIT_VALUES=75` of
LSF). A process that such a signal ends before it could save has 143 or 138 instead.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from llama2rt.parallel import faults, world

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # EX_TEMPFAIL
# A scheduler signals a whole job and torchrun passes its own signal on: two of them are one wish.
_SAME_WISH_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """A run has saved and stopped after a signal, on every rank."""

    everywhere = True

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 1 if number == signal.SIGINT else REQUEUE


class Interrupts:
    """The first signal that this process has received, and what all ranks make of theirs."""

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0
        self._several = False
        self._before: dict[int, Any] = {}

    def agreed(self) -> int:
        """The signal to stop for, 0 for none: the same on every rank, each of which calls this
        after the same step. One all-reduce of four bytes; in one process it costs nothing."""
        here = world()
        if here.size == 1:
            return self.received
        wish = torch.tensor([self.received], dtype=torch.int32, device=here.device)
        dist.all_reduce(wish, op=dist.ReduceOp.MAX)
        faults.met()
        return int(wish)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, a first signal is only noted, and a second has its usual effect; of several ranks
        one that comes after a while."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers; there Ctrl-C stays immediate
            return
        # Asked here: while rank 0 works by itself it is a world of one.
        self._several = world().size > 1
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for received, handler in self._before.items():
                signal.signal(received, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first = number, time.monotonic()
            if not self._several:
                signal.signal(number, self._before[number])
        elif time.monotonic() - self._first > _SAME_WISH_SECONDS or not self._several:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
