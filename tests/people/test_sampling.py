"""Where responses come from: a model in this process, a server, and what neither may do."""

import contextlib
import http.server
import json
import threading
from collections import Counter
from typing import ClassVar

import pytest
import torch
from annotation_pages import Says, config
from served import KEY, NAME, served, small_engine

from llama2rt.checkpoint import native
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.people.answerers import EngineAnswerer, ServerAnswerer, answerers
from llama2rt.people.config import Variant
from llama2rt.people.sampling import Sampler
from llama2rt.people.store import Store
from llama2rt.people.tasks import NewTask, Tasks

ASKED = [[{"role": "user", "content": f"question {i}"}] for i in range(24)]


def engine_that_ends(tokenizer) -> Engine:
    """A model of random weights for which EOS is as likely as a token that it often says."""
    engine = small_engine(tokenizer)
    said = engine.generate(ASKED[:4], max_tokens=8)
    often, _ = Counter(token for one in said for token in one.tokens).most_common()[0]
    with torch.no_grad():
        weight = engine.model.output.weight
        weight[next(iter(tokenizer.stop_ids))] = weight[often]
    return Engine(engine.model, tokenizer, cache_bytes=64 * 2**20)


def test_a_model_and_its_server_answer(small_tokenizer, tmp_path, monkeypatch) -> None:
    engine = engine_that_ends(small_tokenizer)
    native.save(engine.model, small_tokenizer, tmp_path / "model")
    pair = [
        {"name": name, "model": str(tmp_path / "model"), "max_tokens": 12}
        for name in ("ayes", "noes")
    ]
    found = answerers(config(tmp_path, variants=pair))
    ayes, noes = found["ayes"], found["noes"]
    assert isinstance(ayes, EngineAnswerer) and isinstance(noes, EngineAnswerer)
    assert ayes._engine is noes._engine
    first = ayes.answer(ASKED[:12], range(12))
    # A response depends on prompt and seed alone, and one model's two variants draw apart.
    assert ayes.answer(ASKED[3:5], [3, 4]) == first[3:5]
    assert noes.answer(ASKED[:12], range(12)) != first
    with pytest.raises(InputError, match="context"):
        ayes.answer([[{"role": "user", "content": "fox " * 200}]], [0])
    monkeypatch.setenv("LLAMA2RT_API_KEY", KEY)
    with served(engine) as behind:
        variant = Variant(name="s", server=behind.url, max_tokens=12)
        server = ServerAnswerer(variant)
        assert server._name == NAME
        texts = server.answer(ASKED[:12], range(12))
        assert texts[2:4] == server.answer(ASKED[2:4], [2, 3])
        with pytest.raises(InputError, match="context"):
            server.answer([[{"role": "user", "content": "fox " * 200}]], [0])
    # Some of them end by themselves; those that are cut are none.
    for answers in (first, texts):
        assert {type(text) for text in answers} == {str, type(None)}, answers


class Canned(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of `replies`, (status, JSON), and keeps what was asked."""

    replies: ClassVar[list[tuple[int, object]]] = []
    asked: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, reply = self.replies.pop(0)
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def canned(*replies):
    handler = type("Handler", (Canned,), {"replies": list(replies), "asked": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.asked
        finally:
            server.shutdown()
            thread.join(5)


def said(text, reason="stop"):
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def test_what_other_servers_say() -> None:
    replies = [(200, said(" yes ")), (200, said("cut", "length")), (200, said(None))]
    wrong = [(200, {"choices": []}), (404, {"error": {"message": "no such model"}})]
    with canned(*replies, *wrong) as (url, asked):
        variant = Variant(name="v", server=url, server_model="m", temperature=0.5, top_p=0.9)
        server = ServerAnswerer(variant)
        assert [server.answer(ASKED[:1], [7])[0] for _ in replies] == ["yes", None, None]
        for words in ("chat completion", "no such model"):
            with pytest.raises(InputError, match=words):
                server.answer(ASKED[:1], [7])
    expected = {"model": "m", "messages": ASKED[0], "temperature": 0.5, "top_p": 0.9}
    assert asked[0] == expected | {"max_tokens": 512, "seed": 7}
    with pytest.raises(OSError, match="no answer"):
        server.answer(ASKED[:1], [7])


def test_a_prompt_that_fails_takes_no_other_with_it(tmp_path) -> None:
    class Picky(Says):
        def answer(self, prompts, seeds):
            if any("3" in prompt[-1]["content"] for prompt in prompts):
                raise InputError("prompt 0: leaves no room")
            return super().answer(prompts, seeds)

    tasks = Tasks(Store(tmp_path), raters=1, lease_minutes=1, seed=0)
    names = ("ayes", "noes")
    tasks.add(NewTask(Prompt(f"p{i}", messages), names) for i, messages in enumerate(ASKED))
    tasks.add([NewTask(Prompt("gone", ASKED[0]), ("ayes", "gone"))])
    variants = {"ayes": Says("ayes"), "noes": Picky("noes")}
    sampler = Sampler(tasks, variants, ahead=5)
    while sampler.step():
        pass
    # Five ahead, of which the one that failed is none.
    states = [row["state"] for row in tasks._store.rows("SELECT state FROM tasks ORDER BY id")]
    assert states[:6] == ["ready"] * 3 + ["failed"] + ["ready"] * 2
    assert set(states[6:]) == {"waiting"}
    while sampler._ahead < 40:
        sampler._ahead += 20
        while sampler.step():
            pass
    rows = tasks._store.rows("SELECT state, reason FROM tasks WHERE state != 'ready' ORDER BY id")
    reasons = [row["reason"] for row in rows]
    assert reasons[:3] == ["leaves no room"] * 3 and "'gone'" in reasons[3] and len(reasons) == 4
