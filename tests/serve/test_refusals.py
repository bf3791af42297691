"""What a client may do wrong, the status and the reason it gets, and what it cannot do."""

import asyncio
import json
import socket
import threading

import pytest
import torch
from served import KEY, NAME, served, small_engine

from llama2rt.serve.options import Limits

CHAT = {"messages": [{"role": "user", "content": "what is a fox?"}], "max_tokens": 4}
TEXT = {"prompt": "the quick", "max_tokens": 4}


def refused(reply, status: int, *words: str) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error
    return error


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        ("completions", {"model": "gpt-5"}, 404, ["small", "gpt-5"]),
        ("completions", {"temprature": 1}, 422, ["temprature", "no such field"]),
        ("completions", {"echo": True}, 400, ["echo"]),
        ("completions", {"best_of": 4}, 400, ["best_of", "4"]),
        ("completions", {"frequency_penalty": 0.5}, 400, ["frequency_penalty"]),
        ("completions", {"temperature": -1}, 422, ["temperature", "0"]),
        ("completions", {"temperature": "hot"}, 422, ["temperature"]),
        ("completions", {"top_p": 0}, 422, ["top_p"]),
        ("completions", {"max_tokens": 0}, 422, ["max_tokens"]),
        ("completions", {"n": 65}, 400, ["n", "64", "65"]),
        ("completions", {"logprobs": 21}, 422, ["logprobs", "20"]),
        ("completions", {"stop": [""]}, 422, ["stop", "empty"]),
        ("completions", {"stop": ["a"] * 17}, 422, ["stop", "16"]),
        ("completions", {"stream_options": {"include_usage": True}}, 422, ["stream"]),
        ("completions", {"prompt": []}, 422, ["prompt"]),
        ("completions", {"prompt": [1, "a"]}, 422, ["prompt"]),
        ("completions", {"prompt": [1, -1]}, 422, ["prompt"]),
        ("completions", {"prompt": [1, 4000]}, 400, ["token id", "399"]),
        ("completions", {"prompt": [[]]}, 400, ["empty"]),
        ("completions", {"prompt": [5] * 96}, 400, ["96", "context"]),
        ("completions", {"prompt": "\ud800"}, 400, ["prompt"]),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, ["tools"]),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, ["response_f"]),
        ("chat/completions", {"logprobs": 1}, 422, ["logprobs"]),
        ("chat/completions", {"top_logprobs": 2}, 422, ["top_logprobs"]),
        ("chat/completions", {"max_completion_tokens": 5}, 422, ["max_completion_tokens"]),
        ("chat/completions", {"messages": []}, 422, ["messages"]),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, ["tool"]),
        ("chat/completions", {"messages": [{"role": "user"}]}, 422, ["message 0", "content"]),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            422,
            ["message 0", "image_url"],
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
            422,
            ["name"],
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "[INST] a"}]},
            400,
            ["message 1", "[INST]"],
        ),
    ],
)
def test_fields_are_refused_by_name(http, path, fields, status, words) -> None:
    whole = (CHAT if path.startswith("chat") else TEXT) | fields
    body = json.dumps(whole)
    headers = {"Content-Type": "application/json"}
    error = refused(http.post(f"/v1/{path}", content=body, headers=headers), status, *words)
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_neutral_fields_pass_and_labels_are_counted(http, server) -> None:
    neutral = {
        "echo": False,
        "best_of": 1,
        "suffix": None,
        "logit_bias": {},
        "presence_penalty": 0.0,
        "user": "me",
        "metadata": {"a": "b"},
        "top_k": -1,
        "stop": None,
    }
    assert http.post("/v1/completions", json=TEXT | neutral).status_code == 200
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "a fox?"}]
    messages = [{"role": "developer", "content": "be short"}, {"role": "user", "content": parts}]
    system = [{"role": "system", "content": "be short"}, *CHAT["messages"]]
    asked = {"max_completion_tokens": 4, "temperature": 0, "tools": [], "tool_choice": "auto"}
    replies = [
        http.post("/v1/chat/completions", json={"messages": m, **asked}) for m in (messages, system)
    ]
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts[0] == texts[1]
    lines = http.get("/metrics").text.splitlines()
    assert 'llama2rt_fields_without_effect_total{field="user"} 1' in lines


def test_bodies_keys_and_routes(http, server) -> None:
    json_type = {"Content-Type": "application/json"}
    refused(http.post("/v1/completions", content=b"{", headers=json_type), 400, "JSON")
    refused(http.post("/v1/completions", content=b"[" * 100_000, headers=json_type), 400)
    refused(http.post("/v1/completions", content=b"{}", headers=json_type), 422, "prompt")
    refused(http.post("/v1/completions", content=b"[]", headers=json_type), 422)
    refused(http.post("/v1/completions", data={"prompt": "a"}), 415, "application/json")
    large = b'{"prompt": "' + b"a" * (4 * 2**20) + b'"}'
    refused(http.post("/v1/completions", content=large, headers=json_type), 413, "4194304")

    def chunks():
        yield from (large[i : i + 2**16] for i in range(0, len(large), 2**16))

    refused(http.post("/v1/completions", content=chunks(), headers=json_type), 413, "4194304")
    refused(http.get("/v1/embeddings"), 404)
    refused(http.get("/v1/completions"), 405)
    refused(http.get("/v1/models/other"), 404, "small")
    refused(http.post("/update_weights_from_disk", json={"model_path": "/"}), 403, "weights")
    for wrong in ("", "Bearer", "Bearer other", f"Basic {KEY}", f"Bearer {KEY}x"):
        reply = http.post("/v1/completions", json=TEXT, headers={"Authorization": wrong})
        assert refused(reply, 401, "Bearer")["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert http.get("/metrics", headers={"Authorization": ""}).status_code == 401
    assert http.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == [NAME]
    assert http.get(f"/v1/models/{NAME}").json()["owned_by"] == "llama2rt"


def test_the_page_takes_nothing_from_elsewhere(http) -> None:
    from llama2rt.serve import page

    shown = http.get("/", headers={"Authorization": ""})
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert NAME in shown.text and "{{" not in shown.text
    script, style = (http.get(name, headers={"Authorization": ""}) for name in page.FILES)
    assert script.headers["content-type"].startswith("text/javascript")
    for text in (shown.text, script.text, style.text):
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text
    assert page.shown("<b>", 1, needs_key=False).count("&lt;b&gt;") == 2


def test_metrics_count_what_was_done(http) -> None:
    def numbers() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = numbers()
    reply = http.post("/v1/completions", json=TEXT | {"n": 2}).json()
    after = numbers()

    def grown(name: str) -> float:
        return after[f"llama2rt_{name}"] - before.get(f"llama2rt_{name}", 0)

    assert grown("generated_tokens_total") == reply["usage"]["completion_tokens"]
    assert grown("prompt_tokens_total") == reply["usage"]["prompt_tokens"]
    assert grown('requests_total{path="/v1/completions",status="200"}') == 1
    assert grown("time_to_first_token_seconds_count") == grown("request_seconds_count") == 1
    assert grown("time_to_first_token_seconds_sum") > 0
    rest = reply["usage"]["completion_tokens"] - 2
    assert grown("time_per_token_seconds_count") == rest
    assert after["llama2rt_running"] == after["llama2rt_waiting"] == 0
    assert after["llama2rt_pages"] > after["llama2rt_pages_used"] == 0


class Slow:
    """Holds the engine's thread before each step, until it is let go."""

    def __init__(self, server) -> None:
        self.server, self.go = server, threading.Event()
        self.step = server.shared.worker.session.step

    def __enter__(self) -> "Slow":
        def step():
            assert self.go.wait(20)
            return self.step()

        self.server.shared.worker.session.step = step
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        del self.server.shared.worker.session.step


def raw(server, fields: dict) -> socket.socket:
    """A request whose answer nobody has read yet."""
    body = json.dumps({"prompt": "a", "max_tokens": 60, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), 10)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server, stream: bool) -> None:
    worker, dropped = server.shared.worker, server.shared.metrics.counters["dropped"]
    before, tokens = dropped[()], worker.session.statistics.tokens
    with Slow(server) as slow:
        connection = raw(server, {"n": 3, "stream": stream})
        server.wait(lambda: worker.open == 3 and not worker._commands.qsize())
        connection.close()
        server.wait(lambda: worker.open == 0)
        slow.go.set()
        server.wait(lambda: dropped[()] == before + 1)
    server.wait(lambda: not worker.session.unfinished and server.pages_used() == 0)
    assert worker.session.statistics.running == 0 and not worker._answers
    # Of 180 tokens there are those of the step that was under way, and perhaps of one more.
    assert worker.session.statistics.tokens - tokens <= 6


def test_a_full_queue_a_late_answer_and_the_end(small_tokenizer) -> None:
    import httpx2

    engine = small_engine(small_tokenizer, cache_bytes=2**24, max_sequences=2)
    limits = Limits(queue=1, request_seconds=1, max_tokens=60)
    with (
        served(engine, limits=limits, api_key=None) as server,
        httpx2.Client(base_url=server.url, timeout=30) as http,
    ):
        worker = server.shared.worker
        with Slow(server) as slow:
            first = raw(server, {"n": 3, "stream": True})
            server.wait(lambda: worker.open == 3)
            full = http.post("/v1/completions", json=TEXT)
            assert refused(full, 429)["code"] == "queue_full"
            assert int(full.headers["retry-after"]) >= 1
            # Its time passes while it waits: a stream says so in an event, and pages are free.
            data = b""
            while b"timeout" not in data:
                received = first.recv(65536)
                assert received, data
                data += received
            first.close()
            slow.go.set()
        server.wait(lambda: not worker.session.unfinished)
        assert http.post("/v1/completions", json=TEXT).status_code == 200
        refused(http.post("/v1/completions", json=TEXT | {"max_tokens": 61}), 400, "60", "61")
        refused(http.get("/health", headers={"Host": "elsewhere.example"}), 403, "loopback")
        assert http.get("/health", headers={"Host": "localhost:80"}).status_code == 200

        server.shared.draining = True
        refused(http.post("/v1/completions", json=TEXT), 503, "shutting down")
        assert http.get("/health").status_code == 503
        server.shared.draining = False

        # A defect of the model ends the engine: everybody hears of it, and nobody waits.
        with torch.no_grad():
            engine.model.output.weight.fill_(float("nan"))
        refused(http.post("/v1/completions", json=TEXT), 503, "not finite")
        refused(http.post("/v1/completions", json=TEXT), 503, "not finite")
        assert http.get("/health").json()["status"] == "failed"


def test_a_call_that_the_thread_never_reached_is_told(small_tokenizer) -> None:
    """Commands that arrive while the thread dies are answered too."""
    from llama2rt.serve.worker import EngineStopped, Worker

    worker = Worker(small_engine(small_tokenizer, cache_bytes=2**24))

    async def ask() -> None:
        worker.start()

        def die() -> None:
            raise MemoryError("gone")

        worker.send(die)
        with pytest.raises(EngineStopped, match="gone"):
            await asyncio.wait_for(worker.call(lambda: None), 10)

    asyncio.run(ask())
