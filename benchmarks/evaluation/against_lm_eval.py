"""lm-eval's tasks through our class against its own Hugging Face backend, on the same weights.

Five tasks, of which the files are written from real data into a temporary folder: GSM8K answered,
the right one among four model solutions to GSM8K, TinyShakespeare's perplexity in rolling windows,
the harmless one of two answers (HH), and the last word of lines of TinyShakespeare. Both sides get
the same requests. Every log-likelihood, greedy flag and answer is compared before any time is
reported. The backend reads in fp32, as ours does, and once more in fp64: a task's log-likelihoods
of ours may be no further than 1e-4 from that, or than the backend's own fp32 results are (it sums a
continuation in fp32, whose steps are 2.4e-4 beyond -2048), and no flag or answer may differ. Rounds
alternate; the backend has batches of each size in `--batches`, and its best time counts. Times are
the process's CPU seconds, which other work on the machine changes least.

    pip install 'llama2rt[lm-eval]' transformers accelerate
    python benchmarks/evaluation/against_lm_eval.py --data ../shared/data --out build/lm-eval.json

The model has random weights of `--scale` times the usual size, so that some tokens are likelier
than others, LLaMA's vocabulary, and 512 tokens of context, which rolling windows go beyond.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from local_tasks import AGAINST_HF, write_tasks
from records import commit, processor, versions

from llama2rt.checkpoint import hf
from llama2rt.evaluate.harness.model import HarnessModel
from llama2rt.evaluate.harness.tasks import load_tasks
from llama2rt.model import Llama, LlamaConfig
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.allocator import keep_freed_memory

CLOSE = 1e-4  # of ours to fp64, where the backend's fp32 is no further from it


def requests(paths: list[str]) -> dict[str, list[Any]]:
    """By task, what the harness would ask a model."""
    found = {}
    for name, task in load_tasks(paths).loaded["tasks"].items():
        task.build_all_requests()
        found[name] = task.instances
    return found


def answer(lm: Any, asked: list[Any]) -> tuple[list[Any], float]:
    """(answers, seconds of CPU) to one task's requests."""
    method = getattr(lm, asked[0].request_type)
    begin = time.process_time()
    return method(asked), time.process_time() - begin


def values(answers: list[Any]) -> np.ndarray:
    """Log-likelihoods fp64 [n]."""
    return np.array([a[0] if isinstance(a, tuple) else a for a in answers], np.float64)


def differences(
    asked: list[Any], answers: dict[str, list[Any]], exact: Any | None
) -> dict[str, Any]:
    """How far the sides are apart on one task; SystemExit where it is more than rounding."""
    mine = answers["ours"]
    others = {side: given for side, given in answers.items() if side != "ours"}
    found: dict[str, Any] = {"requests": len(asked)}
    if asked[0].request_type == "generate_until":
        for side, theirs in others.items():
            parted = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
            for i in parted:
                print(f"{asked[i].task_name} {i}: {mine[i]!r} against {theirs[i]!r}")
            if parted:
                raise SystemExit(f"{side}: {len(parted)} of {len(asked)} answers differ")
        return found | {"answers_that_differ": 0}
    assert exact is not None
    true = values(answer(exact, asked)[0])
    from_exact = {s: float(np.abs(values(given) - true).max()) for s, given in answers.items()}
    found["lowest"] = float(true.min())
    found["from_fp64"] = from_exact
    found["from_ours"] = {
        side: float(np.abs(values(theirs) - values(mine)).max()) for side, theirs in others.items()
    }
    flags = sum(
        a[1] != b[1]
        for theirs in others.values()
        for a, b in zip(mine, theirs, strict=True)
        if isinstance(a, tuple)
    )
    by_itself = min(apart for side, apart in from_exact.items() if side != "ours")
    if flags or from_exact["ours"] > max(CLOSE, by_itself):
        raise SystemExit(f"{asked[0].task_name}: {found}, {flags} flags differ")
    return found | {"flags_that_differ": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--tasks", nargs="+", choices=AGAINST_HF, default=list(AGAINST_HF))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    tokenizer = Tokenizer.load(options.data / "llama_tokenizer.model")
    config = LlamaConfig(dim=288, layers=6, heads=6, kv_heads=6, ffn_hidden=768, context=512)
    model = Llama(config).initialize(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(options.scale)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf.save(model, tokenizer, folder / "model")
        sides: dict[str, Callable[[], Any]] = {"ours": HarnessModel(model, tokenizer)}
        for batch in options.batches:
            sides[f"hf, batches of {batch}"] = HFLM(
                pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=batch
            )
        exact = HFLM(
            pretrained=str(folder / "model"),
            device="cpu",
            dtype="float64",
            softmax_dtype="float64",
            batch_size=1,
        )
        paths = write_tasks(AGAINST_HF, options.data, folder, options.documents)
        asked = {k: v for k, v in requests(paths).items() if k in options.tasks}
        rows = []
        for task, of_task in asked.items():
            rows.append(measure(task, of_task, sides, options.rounds, exact))
            if options.out:
                write(options, vars(config), rows)


def write(options: argparse.Namespace, shape: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    sides = rows[0]["cpu_seconds"]
    totals = {side: sum(statistics.median(row["cpu_seconds"][side]) for row in rows)
              for side in sides}  # fmt: skip
    best = min(seconds for side, seconds in totals.items() if side != "ours")
    record = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(("torch", "lm_eval", "transformers")),
        "shape": shape,
        "documents": options.documents,
        "rounds": options.rounds,
        "tasks": rows,
        "ratio": round(best / totals["ours"], 2),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def measure(
    task: str, asked: list[Any], sides: dict[str, Any], rounds: int, exact: Any
) -> dict[str, Any]:
    """A task's row: differences and seconds of each side, its median over the rounds."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, Any] = {}
    for number in range(rounds):
        answers = {}
        for side, lm in sides.items():
            answers[side], taken = answer(lm, asked)
            seconds[side].append(taken)
        if number == 0:
            found = differences(asked, answers, exact)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    best = min(value for side, value in medians.items() if side != "ours")
    row = {
        "task": task,
        "differences": found,
        "cpu_seconds": {side: [round(t, 3) for t in times] for side, times in seconds.items()},
        "ratio": round(best / medians["ours"], 2),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
