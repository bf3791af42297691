"""A page over a store of the test's own, with variants that are functions."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from annotators import Annotator

from llama2rt.people.config import Config
from llama2rt.people.inputs import tasks as new_tasks
from llama2rt.people.sampling import Sampler
from llama2rt.people.store import Store
from llama2rt.people.tasks import Tasks


class Says:
    """Answers with its own name and what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, []

    def answer(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[str | None]:
        self.asked += list(zip(prompts, seeds, strict=True))
        return [f"{self.name} answers: {prompt[-1]['content']}" for prompt in prompts]


@dataclass
class Page:
    """A page that is served, and what is behind it."""

    url: str
    site: Any
    sampler: Sampler

    def annotator(self, name: str = "ada", *, coordinator: bool = False) -> Annotator:
        """Somebody new who is logged in."""
        token = self.site.accounts.invite(name, coordinator=coordinator)
        found = Annotator(self.url)
        assert found.log_in(token).status == 303
        return found

    def judgements(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.site.store.rows("SELECT * FROM judgements ORDER BY id")]


def config(folder: Path, **values: Any) -> Config:
    if "pairs" not in values and "variants" not in values:
        values["variants"] = [
            {"name": name, "server": "http://127.0.0.1:1"} for name in ("ayes", "noes")
        ]
    return Config.model_validate({"store": folder / "store", **values})


@contextlib.contextmanager
def page(given: Config, variants: dict[str, Any] | None = None) -> Iterator[Page]:
    """Serve until the block ends."""
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra serve)")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    pytest.importorskip("markdown_it", reason="markdown-it-py is not installed (extra serve)")
    from llama2rt.people import app, guard
    from llama2rt.people.config import guidelines
    from llama2rt.people.views import Views
    from llama2rt.serve.address import listening

    store = Store(given.store)
    store.remember("mode", given.mode)
    tasks = Tasks(store, raters=given.raters, lease_minutes=given.lease_minutes, seed=given.seed)
    tasks.add(new_tasks(given))
    if variants is None:
        variants = {variant.name: Says(variant.name) for variant in given.variants}
    sampler = Sampler(tasks, variants, given.ahead)
    site = app.Site(given, store, tasks, Views(guidelines(given)), sampler, "test")
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        built = app.build(site, guard.origins("127.0.0.1", port, given.public_url))
        server = uvicorn.Server(
            uvicorn.Config(built, log_level="error", timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive() and time.monotonic() < end, "the page did not start"
                time.sleep(0.005)
            yield Page(f"http://127.0.0.1:{port}", site, sampler)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
    store.close()


def pairs_file(path: Path, count: int, kind: str = "helpfulness") -> Path:
    """A pairs.jsonl of `count` pairs as the stage annotate writes them."""
    rows = [
        {
            "part": "training",
            "id": f"training:{i}",
            "prompt_id": f"p{i}",
            "kind": kind,
            "messages": [{"role": "user", "content": f"question {i}"}],
            "first": f"first answer {i}",
            "second": f"second answer {i}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
