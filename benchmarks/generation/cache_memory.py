"""Peak memory of sampling long prompts under a limit on the cache: 134M, 256 prompts of 500 tokens.

Each limit runs in a process of its own, with the allocator of the command line. Its peak resident
size is counted from just before `Engine.generate`, with the model in memory and after one sample of
one token, which loads the libraries that sampling needs. It must stay below `cache_bytes`, which
counts keys, values and a forward pass. All limits must give the same tokens; the model prefers some
tokens to others, so that rounding does not choose.

    python benchmarks/generation/cache_memory.py --out build/cache-memory.json
    python benchmarks/generation/cache_memory.py --prompts 24 --mib 128 1024     (a few minutes)
"""

import argparse
import ctypes
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

SHAPE = {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn_hidden": 2048}
MIB = 2**20


class Ids:
    """A tokenizer for token ids without text; no id ends a sequence."""

    bos, eos, vocab_size = 1, -1, 32000
    stop_ids = (-1,)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def sample(settings: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import numpy as np
    import torch

    from llama2rt.generate import Engine
    from llama2rt.model import Llama, LlamaConfig
    from llama2rt.train.allocator import keep_freed_memory

    model = Llama(LlamaConfig(**settings["shape"])).initialize(0)
    with torch.no_grad():
        model.output.weight.mul_(15)
    model.to(getattr(torch, settings["dtype"]))
    rng = np.random.default_rng(0)
    most = model.config.vocab_size
    prompts = [
        rng.integers(3, most, settings["length"]).tolist() for _ in range(settings["prompts"])
    ]
    engine = Engine(
        model,
        Ids(),
        max_sequences=256,
        cache_bytes=settings["mib"] * MIB if settings["mib"] else None,
    )
    engine.generate([[3, 4, 5]], max_tokens=1)
    # What building the model has freed goes back first: a heap that keeps it would hide the cache.
    ctypes.CDLL(None).malloc_trim(0)
    keep_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before, start = resident("VmRSS"), time.perf_counter()
    done = engine.generate(prompts, max_tokens=settings["tokens"], seed=1)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    digest = hashlib.sha256(json.dumps([c.tokens for c in done]).encode()).hexdigest()
    return {
        "mib": settings["mib"],
        "model_mib": sum(p.nbytes for p in model.parameters()) / MIB,
        "before_mib": before / MIB,
        "peak_above_mib": (peak - before) / MIB,
        "seconds": seconds,
        "tokens_sha256": digest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(sample(json.loads(given.alone))))
        return
    settings = {
        "shape": SHAPE | {"layers": given.layers},
        **{name: getattr(given, name) for name in ("prompts", "length", "tokens", "dtype")},
    }
    rows = []
    for mib in given.mib:
        alone = json.dumps(settings | {"mib": mib})
        said = subprocess.run(
            [sys.executable, "-P", __file__, "--alone", alone],
            check=True,
            capture_output=True,
            text=True,
        )
        row = json.loads(said.stdout)
        row["left_mib"] = mib - row["peak_above_mib"]
        rows.append(row)
        print(
            f"cache_bytes {mib:6} MiB: peak {row['peak_above_mib']:7.0f} MiB above what was held "
            f"before (model {row['model_mib']:.0f} MiB), {row['seconds']:.0f} s, "
            f"tokens {row['tokens_sha256'][:12]}",
            flush=True,
        )
    if len({row["tokens_sha256"] for row in rows}) != 1:
        sys.exit("the samples depend on cache_bytes")
    over = [row["mib"] for row in rows if row["left_mib"] < 0]
    if over:
        sys.exit(f"more memory than cache_bytes with {over} MiB")
    if given.out:
        import records

        given.out.parent.mkdir(parents=True, exist_ok=True)
        found = records.header("cpu") | {
            "what": "peak memory of generate",
            **settings,
            "rows": rows,
        }
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
