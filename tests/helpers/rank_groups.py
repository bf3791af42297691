"""Groups of ranks to be killed: each rank a process of its own, forked from one that has imported
what they need, since importing takes longer than their work. No torchrun: a group must end without
one too.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_pool import forking, free_port

_TORCH = ("[rank", "[W", "Exception raised from", "frame #", "<omitting python frames>")


class Group:
    """`size` processes that call `function(*arguments)` as ranks, their stderr in `folder`."""

    def __init__(
        self, size: int, folder: Path, function: Callable[..., Any], *arguments: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._said = [folder / f"rank-{rank}.log" for rank in range(size)]
        context = forking()
        port = free_port()
        self._processes = [
            context.Process(
                target=_rank,
                args=(rank, size, port, self._said[rank], list(sys.path), function, arguments),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def kill(self, rank: int, number: int) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float = 60.0) -> list[int]:
        """Exit statuses by rank (negative: the signal). AssertionError, and no process left, where
        one has not ended by then."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self._processes) if process.is_alive()]
        for process in self._processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} have not ended after {seconds} s: {self.said()}"
        return [int(process.exitcode or 0) for process in self._processes]

    def said(self) -> list[str]:
        """The lines that all ranks have written to stderr, rank by rank; without that they have
        met, and what torch warns of where the store has gone with rank 0."""
        texts = [path.read_text() for path in self._said if path.exists()]
        lines = [line for text in texts for line in text.split("\n") if line]
        return [line for line in lines if not line.startswith(_TORCH) and " ranks on " not in line]


def _rank(
    rank: int,
    size: int,
    port: int,
    said: Path,
    path: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    function(*arguments)
