"""Ranks that stay: gloo processes that run one function after the other, started once a module.

Tests share two groups of them, forked from a process that has imported what ranks need, which takes
seconds. A function is found by its name in a module of tests/helpers (a test module cannot be
imported by its own); what it returns is pickled. A rank that raises fails the test with its
traceback, and the group, whose other ranks may wait in a collective, is started anew.
"""

import importlib
import multiprocessing
import multiprocessing.context
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

SECONDS = 240
# torch._dynamo: what DTensor imports at its first use.
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "llama2rt.cli",
    "llama2rt.parallel.command",
    "llama2rt.train.loop",
    "rank_imports",
]


def forking() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported all that ranks need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # It would find the package of this checkout first, whose native modules are not built.
    with mock.patch.dict(os.environ, {"PYTHONSAFEPATH": "1"}):
        forkserver.ensure_running()
    return context


class RankFailed(AssertionError):
    """What a rank raised, as text."""


class RankPool:
    """`size` ranks on this machine's loopback."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list:
        """[what `function(*arguments)` returned, by rank]: called on all ranks at once. RankFailed
        with the first traceback, or where no answer came in time."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=seconds)
            if not ready:
                silent = [rank for rank in range(self.size) if rank not in results]
                self.stop()
                raise RankFailed(f"{function.__name__}: no answer of ranks {silent}")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failed, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, value = True, "the process ended"
                if failed:
                    self.stop()
                    raise RankFailed(f"rank {rank} of {self.size}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = forking()
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, port, list(sys.path)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


@contextmanager
def pools() -> Iterator[Callable[..., list]]:
    """`run(size, function, *arguments)` on a pool of that size, made when first asked for."""
    made: dict[int, RankPool] = {}

    def run(size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list:
        return made.setdefault(size, RankPool(size)).run(function, *arguments, **options)

    try:
        yield run
    finally:
        for pool in made.values():
            pool.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(pipe: Connection, rank: int, size: int, port: int, path: list[str]) -> None:
    sys.path[:] = path
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from llama2rt.parallel.world import start

    torch.set_num_threads(1)
    start()
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(importlib.import_module(module), name)(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
