"""The server's process: it listens, answers, and ends when it is told to."""

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

if TYPE_CHECKING:
    from llama2rt.serve.app import Server

_BACKLOG = 2048  # connections that wait to be taken; uvicorn's own number


class Process(uvicorn.Server):
    """Serves `app` until SIGTERM or Ctrl-C; what is under way has `shutdown_seconds` to end.
    `on_signal` is called when a signal has come: from then on no new requests should be taken."""

    def __init__(self, app: FastAPI, shutdown_seconds: int, on_signal: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_level="error",
            timeout_graceful_shutdown=shutdown_seconds,
            server_header=False,
        )
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()
        super().handle_exit(sig, frame)

    def end(self) -> None:
        self.should_exit = True

    def serve_at(self, listener: socket.socket, host: str, name: str) -> None:
        """Serve what comes to `listener`, which is bound to `host`; say on stderr where that is."""
        listener.listen(_BACKLOG)  # who reads the line below may ask at once
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        print(f"{name} at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        # It warns of every client that leaves in the middle of an answer.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        with _signals_ignored():
            self.run(sockets=[listener])


def run(app: FastAPI, shared: "Server", listener: socket.socket, host: str) -> None:
    """Serve a model until SIGTERM or Ctrl-C. What ended the engine is raised."""

    def drain() -> None:
        shared.draining = True

    process = Process(app, shared.limits.shutdown_seconds, drain)
    shared.worker.on_failure = process.end
    process.serve_at(listener, host, shared.name)
    if shared.worker.failure is not None:
        raise shared.worker.failure


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """uvicorn catches the signals that end it, and raises them again when it has shut down: then
    they have done their work."""

    def ignore(*_: object) -> None:
        pass

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
