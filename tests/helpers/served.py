"""A server on a free port of the loopback address, in a thread of this process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from small_models import far_from_flat

from llama2rt.generate import Engine
from llama2rt.serve.options import Limits
from llama2rt.serve.worker import Worker

KEY = "a key"
NAME = "small"
LIMITS = Limits()


@dataclass(frozen=True)
class Served:
    url: str
    shared: Any  # serve.app.Server
    engine: Engine

    def wait(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        """Until `holds()`; AssertionError where it does not come to that."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.shared.worker.statistics
            time.sleep(0.005)

    def pages_used(self) -> int:
        return self.shared.worker.statistics.pages_used


def small_engine(tokenizer: Any, **options: Any) -> Engine:
    """A model of random weights that prefers some tokens, with a context of 96."""
    return Engine(far_from_flat(vocab_size=tokenizer.vocab_size), tokenizer, **options)


@contextlib.contextmanager
def served(
    engine: Engine, *, limits: Limits = LIMITS, api_key: str | None = KEY, **options: Any
) -> Iterator[Served]:
    """`engine` behind HTTP, until the block ends; a skip where fastapi or uvicorn is missing."""
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra serve)")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    from llama2rt.serve.app import Server, build

    shared = Server(Worker(engine), NAME, limits, **options)
    config = uvicorn.Config(build(shared, api_key=api_key), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", shared, engine)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
