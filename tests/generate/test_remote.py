"""Samples by a server: equal to the engine's where they can be, checked, refused by name."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from served import KEY, served, small_engine
from small_models import far_from_flat

from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.generate.remote import Handover, Remote, RemoteOptions
from llama2rt.generate.remote import client as remote_client
from llama2rt.generate.remote.client import Client
from llama2rt.text import chat

MESSAGES = [{"role": "user", "content": "what is a fox?"}]


@pytest.fixture(scope="module")
def engine(small_tokenizer):
    return Engine(far_from_flat(vocab_size=small_tokenizer.vocab_size), small_tokenizer)


@pytest.fixture(scope="module")
def ours(small_tokenizer, tmp_path_factory):
    """`llama2rt serve` of the same weights; it reads others below a folder."""
    folder = tmp_path_factory.mktemp("weights")
    with served(small_engine(small_tokenizer, cache_bytes=2**26), weights_from=folder) as found:
        yield found, folder


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(remote_client, "_FIRST_WAIT_S", 0.001)


def remote(server, engine, tolerance: float = 1e-4, **options) -> Remote:
    return Remote(
        server.url,
        engine.model,
        engine.tokenizer,
        api_key=KEY,
        options=RemoteOptions(tolerance=tolerance, **options),
    )


def test_our_server_gives_the_engines_tokens_and_logprobs(ours, engine) -> None:
    prompts = [MESSAGES, engine.tokenizer.encode("the quick brown", bos=True)]
    asked = {"max_tokens": 20, "temperature": 0.0}
    seen = []
    there = remote(ours[0], engine).generate(
        prompts, indices=[3, 5], on_finish=seen.append, **asked
    )
    here = engine.generate(prompts, indices=[3, 5], **asked)
    assert [vars_of(c, "logprobs") for c in there] == [vars_of(c, "logprobs") for c in here]
    for a, b in zip(there, here, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len(seen) == 2

    drawn = {"n": 3, "temperature": 0.7, "top_p": 0.95, "seed": 11, "max_tokens": 16}
    first = remote(ours[0], engine, check=100).generate(prompts, **drawn)
    again = remote(ours[0], engine).generate(prompts[1:], indices=[1], **drawn)
    assert [c.tokens for c in first[3:]] == [c.tokens for c in again]
    assert len({tuple(c.tokens) for c in first[:3]}) == 3
    assert [c.prompt_index for c in first] == [0, 0, 0, 1, 1, 1]


def vars_of(completion, *but: str) -> dict:
    names = type(completion).__slots__
    return {name: getattr(completion, name) for name in names if name not in but}


def test_other_weights_are_found_out(ours, engine) -> None:
    other = Engine(far_from_flat(vocab_size=engine.tokenizer.vocab_size, seed=1), engine.tokenizer)
    sampler = remote(ours[0], engine, tolerance=0.5).of(other.model)
    with pytest.raises(InputError, match=r"prompt 0: the server says log-probability .* weights"):
        sampler.generate([MESSAGES], max_tokens=8)


def test_weights_are_handed_over_once_and_again(ours, engine, monkeypatch) -> None:
    from llama2rt.checkpoint import hf

    server, folder = ours
    written = []
    monkeypatch.setattr(
        hf, "save", lambda *a, save=hf.save, **k: (written.append(a[2]), save(*a, **k))
    )
    sampler = remote(server, engine)
    sampler.handover = Handover(folder / "policy", f"{server.url}/update_weights_from_disk")
    greedy = {"temperature": 0.0, "max_tokens": 12}
    changed = far_from_flat(vocab_size=engine.tokenizer.vocab_size, seed=2)
    for model in (changed, changed, engine.model):
        there = sampler.of(model).generate([MESSAGES], **greedy)
        assert there[0].tokens == engine.of(model).generate([MESSAGES], **greedy)[0].tokens
    assert written == [folder / "policy"] * 2
    with torch.no_grad():
        changed.output.weight.mul_(1.5)
    assert (
        sampler.of(changed).generate([MESSAGES], **greedy)[0].tokens
        == engine.of(changed).generate([MESSAGES], **greedy)[0].tokens
    )
    sampler.generate([MESSAGES], **greedy)  # what the other tests compare with

    elsewhere = Handover(folder.parent / "other", sampler.handover.reload)
    with pytest.raises(InputError, match="403: model_path"):
        elsewhere.hand_over(changed, engine.tokenizer, sampler.client)


def test_a_command_reloads(ours, engine, tmp_path) -> None:
    client = remote(ours[0], engine).client
    model = far_from_flat(vocab_size=engine.tokenizer.vocab_size, seed=3)
    told = tmp_path / "told"
    command = f"""sh -c 'ls "$LLAMA2RT_WEIGHTS" > {told}'"""
    Handover(tmp_path / "w", command).hand_over(model, engine.tokenizer, client)
    assert {"config.json", "model.safetensors"} <= set(told.read_text().split())
    with pytest.raises(OSError, match="status 3: no GPU"):
        failing = Handover(tmp_path / "w", "sh -c 'echo no GPU >&2; exit 3'")
        failing.hand_over(engine.model, engine.tokenizer, client)
    with pytest.raises(InputError, match="reload"):
        Handover(tmp_path / "w", " ")


# Servers that are not here, by the shape of what they send.


@contextlib.contextmanager
def canned(answer: Callable[[str, dict | None], tuple[int, object, dict]]) -> Iterator[str]:
    """The URL of a server that replies `answer(path, body)`: status, JSON (bytes as they are),
    headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body: dict | None = None) -> None:
            status, value, headers = answer(self.path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.do_GET(json.loads(self.rfile.read(length)))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def models(owner: str, name: str = "m") -> dict:
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner}]}


class Standing:
    """What a server of one kind would send for what `engine` draws."""

    def __init__(self, engine: Engine, owner: str, choice: Callable, **paths: object) -> None:
        self.engine, self.owner, self.choice, self.paths = engine, owner, choice, paths
        self.bodies: list[dict] = []

    def __call__(self, path: str, body: dict | None) -> tuple[int, object, dict]:
        if path == "/v1/models":
            return 200, models(self.owner), {}
        if body is None:
            name = path.strip("/").replace(".", "_")
            return (200, self.paths[name], {}) if name in self.paths else (404, {}, {})
        self.bodies.append(body)
        prompt = body.get("messages") or body["prompt"]
        if isinstance(prompt, str):
            prompt = self.engine.tokenizer.encode(prompt, bos=True)
        config = json.loads(body.get("generation_config", "{}"))
        drawn = self.engine.generate(
            [prompt],
            body.get("n", 1) if self.owner else 1,
            config.get("temperature", body.get("temperature", 0.0)),
            max_tokens=config.get("max_new_tokens", body.get("max_tokens")),
            seed=body["seed"],
        )
        choices = [{"index": i, **self.choice(self.engine, c)} for i, c in enumerate(drawn)]
        usage = {"prompt_tokens": len(drawn[0].prompt_tokens)}
        return 200, {"choices": choices[::-1], "usage": usage}, {}

    @contextlib.contextmanager
    def sampler(self, **options) -> Iterator[Remote]:
        with canned(self) as url:
            settings = RemoteOptions(**{"tolerance": 1e-4, **options})
            yield Remote(f"{url}/v1", self.engine.model, self.engine.tokenizer, options=settings)


def vllm(engine: Engine, completion) -> dict:
    """Log-probabilities before the temperature, as vLLM's are by default."""
    ids = completion.prompt_tokens + completion.tokens
    tokens = torch.tensor(ids)
    positions = torch.arange(len(ids))
    with torch.no_grad():
        raw = engine.model(
            tokens, positions, torch.tensor([0, len(ids)], dtype=torch.int32), tokens.roll(-1)
        )
    return {
        "text": completion.text,
        "token_ids": completion.tokens,
        "prompt_token_ids": completion.prompt_tokens,
        "logprobs": {"token_logprobs": raw[len(completion.prompt_tokens) - 1 : -1].tolist()},
        "finish_reason": completion.finish_reason,
    }


def llamacpp(engine: Engine, completion) -> dict:
    """Ids and log-probabilities in a chat's shape; the EOS is not among them."""
    ended = completion.finish_reason == "stop"
    shown = list(zip(completion.tokens, completion.logprobs, strict=True))
    shown = shown[:-1] if ended else shown
    return {
        "text": completion.text,
        "logprobs": {"content": [{"id": i, "token": "", "logprob": p} for i, p in shown]},
        "finish_reason": completion.finish_reason,
    }


def text_only(engine: Engine, completion) -> dict:
    said = {"message": {"role": "assistant", "content": completion.text}}
    return {**said, "text": completion.text, "finish_reason": completion.finish_reason}


def test_vllm_whose_logprobs_are_before_the_temperature(engine) -> None:
    standing = Standing(engine, "vllm", vllm)
    with standing.sampler() as sampler:
        for temperature in (0.0, 1.0, 0.6):
            found = sampler.generate([MESSAGES], 2, temperature, max_tokens=12)
            body = standing.bodies[-1]
            here = engine.generate([MESSAGES], 2, temperature, max_tokens=12, seed=body["seed"])
            assert [c.tokens for c in found] == [c.tokens for c in here]
            for a, b in zip(found, here, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    # What its generation_config.json would say otherwise is said.
    assert body["return_token_ids"] and body["top_k"] == 0 and body["repetition_penalty"] == 1.0
    assert body["prompt"] == chat.encode_prompt(engine.tokenizer, MESSAGES)
    with standing.sampler(check=0) as sampler, pytest.raises(InputError, match="check: 0"):
        sampler.generate([MESSAGES], temperature=0.6, max_tokens=4)


def test_llamacpp_whose_eos_is_only_a_reason(small_tokenizer) -> None:
    model = far_from_flat(vocab_size=small_tokenizer.vocab_size)
    with torch.no_grad():  # so that answers end by themselves
        model.output.weight[small_tokenizer.eos] *= 3
    engine = Engine(model, small_tokenizer)
    standing = Standing(engine, "llamacpp", llamacpp)
    with standing.sampler() as sampler:
        found = sampler.generate([MESSAGES] * 6, 2, max_tokens=30)
    seeds = [body["seed"] for body in sorted(standing.bodies, key=lambda b: b["seed"])]
    drawn = {seed: engine.generate([MESSAGES], 2, max_tokens=30, seed=seed) for seed in seeds}
    here = {tuple(c.tokens): c for completions in drawn.values() for c in completions}
    assert any(c.finish_reason == "stop" for c in found) and len(set(seeds)) == 6
    for completion in found:
        expected = here[tuple(completion.tokens)]
        assert completion.text == expected.text
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_transformers_which_reads_text_and_gives_one_answer(engine) -> None:
    paths = {"/load_model": {}, "/reset": {}}
    standing = Standing(engine, "", text_only, openapi_json={"paths": paths})
    other = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "jump"}]
    with standing.sampler() as sampler:
        found = sampler.generate([MESSAGES, other], n=2, temperature=0.0, max_tokens=12)
        here = engine.generate([MESSAGES, other], temperature=0.0, max_tokens=12)
        texts = [c.text for c in found]
        assert texts[::2] == texts[1::2] == [c.text for c in here]
        # Tokens are those of the text, and their log-probabilities ours.
        assert all(len(c.logprobs) == len(c.tokens) for c in found)
        assert len({body["seed"] for body in standing.bodies}) == 4
        config = json.loads(standing.bodies[0]["generation_config"])
        assert config["do_sample"] is False and config["max_new_tokens"] == 12
        sampler.generate([other], temperature=0.5, max_tokens=2)
        config = json.loads(standing.bodies[-1]["generation_config"])
        assert config["do_sample"] is True and config["top_k"] == 0
        with pytest.raises(InputError, match=r"prompt 0: token ids: .* by messages"):
            sampler.generate([[1, 5]], max_tokens=2)


def test_a_server_that_says_no_ids(engine) -> None:
    standing = Standing(engine, "sglang", text_only)
    ids = engine.tokenizer.encode("the quick brown", bos=True)
    with standing.sampler() as sampler:
        found = sampler.generate([MESSAGES, ids], n=2, temperature=0.0, max_tokens=12)
    here = engine.generate([MESSAGES, ids], temperature=0.0, max_tokens=12)
    assert [c.text for c in found[::2]] == [c.text for c in here]
    assert all(len(c.logprobs) == len(c.tokens) for c in found)
    assert standing.bodies[0]["top_k"] == -1 and len(standing.bodies) == 2


def replies(engine: Engine, reply: object) -> Callable[[str, dict | None], tuple]:
    return lambda path, body: (200, models("vllm") if body is None else reply, {})


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"token_ids": [5, 9999]}, "token 9999"),
        ({"token_ids": [5, 2, 6]}, "behind token 1"),
        ({"token_ids": []}, "no tokens"),
        ({"token_ids": [5, 6, 7, 8, 9]}, "5 tokens, asked for at most 4"),
        ({"token_ids": [5], "finish_reason": "content_filter"}, "content_filter"),
        ({"token_ids": [5], "prompt_token_ids": [1]}, "other prompt tokens"),
        ({"token_ids": "five"}, "not an OpenAI completion"),
        ({"token_ids": [5], "logprobs": {"token_logprobs": [1e9]}}, "log-probability"),
    ],
)
def test_answers_that_cannot_be(engine, choice, words) -> None:
    reply = {"choices": [{"text": "", "finish_reason": "length", **choice}]}
    with canned(replies(engine, reply)) as url:
        sampler = Remote(url, engine.model, engine.tokenizer)
        with pytest.raises(InputError, match=f"prompt 0: .*{words}"):
            sampler.generate([MESSAGES], max_tokens=4)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": [], "usage": {}}, "no answer"),
        ({"error": "x"}, "not an OpenAI completion"),
        ([1], "not an OpenAI completion"),
        (b"<html>", "not JSON"),
        ({"choices": [], "usage": {"prompt_tokens": 3}}, "counts 3 tokens"),
    ],
)
def test_replies_that_are_none(engine, reply, words) -> None:
    with canned(replies(engine, reply)) as url:
        sampler = Remote(url, engine.model, engine.tokenizer)
        with pytest.raises(InputError, match=f"prompt 0: .*{words}"):
            sampler.generate([MESSAGES], max_tokens=4)


def test_retries_and_their_end(monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote_client.time, "sleep", waits.append)
    answers = [(503, {}, {}), (429, {}, {"Retry-After": "7"}), (200, {"good": 1}, {})]
    asked = []

    def answer(path: str, body: dict | None) -> tuple:
        asked.append(path)
        return answers[min(len(asked) - 1, 2)]

    with canned(answer) as url:
        assert Client(url).get("/x") == {"good": 1} and len(asked) == 3
        assert 7 <= waits[1] < 9
        asked.clear()
        with pytest.raises(ConnectionError, match="2 attempts: status 429"):
            Client(url, attempts=2).get("/x")
    with pytest.raises(ConnectionError, match=r"3 attempts: .*refused"):
        Client(url, attempts=3).get("/x")
    elsewhere = {"Location": "http://127.0.0.1:1/"}
    for status, headers, words in (
        (302, elsewhere, "status 302"),  # the key stays here
        (400, {}, "status 400: too hot"),
    ):
        said = {"error": {"message": "too hot"}}
        with (
            canned(lambda *_, answer=(status, said, headers): answer) as url,
            pytest.raises(InputError, match=words),
        ):
            Client(url, api_key="k").get("/x")
    for wrong in ("ftp://a", "127.0.0.1:8000", "http://", "http://a?b=c"):
        with pytest.raises(InputError, match="server: expected a URL"):
            Client(wrong)


def test_options_and_models_by_name(engine) -> None:
    two = {"data": [*models("vllm", "a")["data"], *models("vllm", "b")["data"]]}
    with canned(lambda path, body: (200, two, {})) as url:
        for options, words in (
            ({}, "name: .*several"),
            ({"name": "c"}, "name: .*a, b, not 'c'"),
            ({"kind": "other"}, "kind: expected auto"),
        ):
            with pytest.raises(InputError, match=words):
                Remote(url, engine.model, engine.tokenizer, options=RemoteOptions(**options))
        sampler = Remote(url, engine.model, engine.tokenizer, options=RemoteOptions(name="b"))
        with pytest.raises(InputError, match="prompt 1: empty"):
            sampler.generate([MESSAGES, []])
        with pytest.raises(InputError, match="prompt 0: 96 tokens leave no room"):
            sampler.generate([[5] * 96])
    for field, value in (("tolerance", 0), ("concurrency", 0), ("timeout_s", float("nan"))):
        with pytest.raises(InputError, match=field):
            RemoteOptions(**{field: value})
