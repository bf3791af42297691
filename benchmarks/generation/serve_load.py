"""Many clients of one server at once: time to the first token, between tokens, and errors.

Each client sends one streamed completion after the other, of a random prompt and length, until the
time is up; then it ends the one it is reading. Without --url a server of random weights is started
on the loopback address, as `llama2rt serve` in a process of its own, and ended with SIGTERM. Times
are the clients': from before a request is sent to each event. Exits 1 if any answer is wrong: an
HTTP error, a stream without its end, or another number of tokens than was counted.

    python benchmarks/generation/serve_load.py --clients 64 --seconds 120
    python benchmarks/generation/serve_load.py --shape 134M --clients 64 --seconds 120 --out r.json
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPES = {
    "1M": {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 4, "ffn_hidden": 352},
    "24M": {"dim": 512, "layers": 6, "heads": 8, "kv_heads": 8, "ffn_hidden": 1376},
    "134M": {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn_hidden": 2048},
}


@dataclass
class Seen:
    """What all clients have measured, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)


async def client(http: Any, number: int, options: argparse.Namespace, seen: Seen) -> None:
    rng = random.Random(number)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        body = {
            "prompt": [rng.randrange(3, options.vocabulary) for _ in range(rng.randint(8, 64))],
            "max_tokens": rng.randint(8, options.tokens),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "seed": rng.getrandbits(31),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        try:
            await one(http, body, seen)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)


async def one(http: Any, body: dict[str, Any], seen: Seen) -> None:
    started = last = time.perf_counter()
    got, usage, done = 0, None, False
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code == 429:
            seen.refused += 1
            await asyncio.sleep(float(reply.headers["retry-after"]))
            return
        if reply.status_code != 200:
            raise RuntimeError(f"status {reply.status_code}: {(await reply.aread())[:200]!r}")
        async for line in reply.aiter_lines():
            if not line:
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            tokens = sum(len(choice["token_ids"]) for choice in chunk["choices"])
            if tokens:
                now = time.perf_counter()
                if got:
                    seen.between += [(now - last) / tokens] * tokens
                else:
                    seen.first.append(now - started)
                got, last = got + tokens, now
    if not done or usage is None or usage["completion_tokens"] != got or not got:
        raise RuntimeError(f"{got} tokens, end {done}, counted {usage}")
    seen.tokens += got
    seen.whole.append(time.perf_counter() - started)


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] if ordered else 0.0
        for share in (50, 99)
    }


@contextlib.contextmanager
def own_server(options: argparse.Namespace) -> Iterator[str]:
    """`llama2rt serve` of random weights."""
    import torch

    from llama2rt.checkpoint import native
    from llama2rt.model import Llama, LlamaConfig
    from llama2rt.text import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        words = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
        texts = [f"{a} {b} {i}" for i, a in enumerate(words * 3) for b in words[::4]]
        tokenizer = Tokenizer.train(texts, 400, Path(folder) / "tokenizer")
        shape = {**SHAPES[options.shape], "vocab_size": options.vocabulary, "context": 512}
        model = Llama(LlamaConfig(**shape)).initialize(0).to(getattr(torch, options.dtype))
        native.save(model, tokenizer, Path(folder) / "model")
        del model
        command = [
            *(sys.executable, "-P", "-m", "llama2rt.cli", "serve", f"{folder}/model"),
            *("--port", "0", "--max-sequences", str(options.clients), *options.serve),
        ]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            if " at http" not in line:
                raise SystemExit(line + server.stderr.read())
            yield line.split(" at ")[1].split()[0]
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                status = server.wait(120)
            except subprocess.TimeoutExpired:
                server.kill()
                raise SystemExit("the server did not end") from None
            print(f"the server ended with status {status}")


async def load(url: str, options: argparse.Namespace) -> tuple[Seen, float, str]:
    import httpx2

    seen = Seen()
    key = os.environ.get("LLAMA2RT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=options.clients)
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=600
    ) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http, i, options, seen) for i in range(options.clients)))
        seconds = time.perf_counter() - started
        metrics = (await http.get("/metrics")).text
    return seen, seconds, metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="a server that runs; by default one is started")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="at most 600")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--shape", choices=SHAPES, default="24M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("serve", nargs="*", help="further options of llama2rt serve, after --")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it the server
    options.seconds = min(options.seconds, 600.0)
    given = contextlib.nullcontext(options.url) if options.url else own_server(options)
    with given as url:
        seen, seconds, metrics = asyncio.run(load(url, options))
    figures = {
        "clients": options.clients,
        "seconds": seconds,
        "shape": None if options.url else f"{options.shape} {options.dtype}",
        "answers": len(seen.whole),
        "tokens": seen.tokens,
        "tokens_per_s": seen.tokens / seconds,
        "time_to_first_token_s": quantiles(seen.first),
        "time_per_token_s": quantiles(seen.between),
        "answer_s": quantiles(seen.whole),
        "refused": seen.refused,
        "errors": len(seen.errors),
    }
    for name, value in figures.items():
        print(f"{name:<24}{value}")
    for error in seen.errors[:5]:
        print(error)
    left = [m for m in metrics.splitlines() if m.startswith(("llama2rt_pages_used ", "llama2rt_r"))]
    print("\n".join(line for line in left if "seconds" not in line))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if seen.errors else 0


if __name__ == "__main__":
    sys.exit(main())
