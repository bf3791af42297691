"""The server's process: it listens, answers, and ends when it is told to."""

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llama2rt.serve.app import Server

_BACKLOG = 2048  # connections that wait to be taken; uvicorn's own number


class _Uvicorn(uvicorn.Server):
    """Says to the application that a signal has come: from then on it takes no new requests."""

    shared: Server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.shared.draining = True
        super().handle_exit(sig, frame)

    def end(self) -> None:
        self.should_exit = True


def run(app: FastAPI, shared: Server, listener: socket.socket, host: str) -> None:
    """Serve until SIGTERM or Ctrl-C; what is under way has `limits.shutdown_seconds` to end. What
    ended the engine is raised."""
    config = uvicorn.Config(
        app,
        log_level="error",
        timeout_graceful_shutdown=shared.limits.shutdown_seconds,
        server_header=False,
    )
    server = _Uvicorn(config)
    server.shared = shared
    shared.worker.on_failure = server.end
    listener.listen(_BACKLOG)  # who reads the line below may ask at once
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    print(f"{shared.name} at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    # It warns of every client that leaves in the middle of an answer.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with _signals_ignored():
        server.run(sockets=[listener])
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
