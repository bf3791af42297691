"""lm-eval's tasks through our class against its own Hugging Face backend, on the same weights.

Five tasks, of which the files are written from real data into a temporary folder: GSM8K answered,
the right one among four model solutions to GSM8K, TinyShakespeare's perplexity in rolling windows,
the harmless one of two answers (HH), and the last word of lines of TinyShakespeare. Both sides get
the same requests. Every log-likelihood, greedy flag and answer is compared before any time is
reported, and one that differs by more than rounding ends the script. Rounds alternate; the backend
has batches of each size in `--batches`, and its best time counts. Times are the process's CPU
seconds, which other work on the machine changes least.

    pip install 'llama2rt[lm-eval]' transformers accelerate
    python benchmarks/evaluation/against_lm_eval.py --data ../shared/data --out build/lm-eval.json

The model has random weights of `--scale` times the usual size, so that some tokens are likelier
than others, LLaMA's vocabulary, and 512 tokens of context, which rolling windows go beyond.
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.models.huggingface import HFLM
from records import commit, processor, versions

from llama2rt.checkpoint import hf
from llama2rt.evaluate.harness.model import HarnessModel
from llama2rt.evaluate.harness.tasks import load_tasks
from llama2rt.model import Llama, LlamaConfig
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.allocator import keep_freed_memory

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
CLOSE = 1e-4  # between log-likelihoods, or relative to a hundredth of one beyond -100


def gsm8k(data: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (data / "gsm8k_train.jsonl").open()]
    return rows, {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:", "\n\n", "</s>"], "max_gen_toks": 48},
        "num_fewshot": 2,
        "metric_list": [{"metric": "exact_match"}],
    }


def solutions(data: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for line in (data / "gsm8k_model_solutions.jsonl").open():
        row = json.loads(line)
        right = [row[name]["is_correct"] for name in SOLVERS]
        if any(right):
            choices = [row[name]["solution"] for name in SOLVERS]
            rows.append(
                {"question": row["question"], "choices": choices, "gold": right.index(True)}
            )
    return rows, {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def shakespeare(data: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    text = (data / "tinyshakespeare.txt").read_text()
    rows = [{"text": text[i : i + 1800]} for i in range(0, len(text), 1800)]
    return rows, {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }


def harmless(data: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    with gzip.open(data / "hh_harmless_base_test.jsonl.gz", "rt") as file:
        for line in file:
            pair = json.loads(line)
            turn = "\n\nAssistant:"
            asked, chosen = pair["chosen"].rsplit(turn, 1)
            other, rejected = pair["rejected"].rsplit(turn, 1)
            if asked == other and chosen.strip() and rejected.strip():
                rows.append({"asked": asked + turn, "choices": [chosen.strip(), rejected.strip()]})
    return rows, {
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }


def cloze(data: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for line in (data / "tinyshakespeare.txt").read_text().split("\n"):
        before, _, word = line.rpartition(" ")
        if len(before) > 20 and word.strip(".,:;!?"):
            rows.append({"before": before, "word": word.strip(".,:;!?")})
    return rows, {
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{' ' + word}}",
        "num_fewshot": 3,
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }


TASKS = {
    "gsm8k_answers": gsm8k,
    "gsm8k_solutions": solutions,
    "shakespeare_rolling": shakespeare,
    "hh_harmless": harmless,
    "shakespeare_cloze": cloze,
}


def write_tasks(data: Path, folder: Path, documents: int) -> list[str]:
    """Task files with their data: `documents` to be asked, 50 more to draw shots from."""
    paths = []
    for name, rows_of in TASKS.items():
        rows, task = rows_of(data)
        files = {"test": rows[:documents], "train": rows[documents : documents + 50]}
        for split, part in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}-{split}.jsonl").write_text(lines)
        task |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{name}-{split}.jsonl") for split in files}
            },
            "test_split": "test",
            "training_split": "train",
            "fewshot_split": "train",
        }
        for metric in task["metric_list"]:
            metric |= {"aggregation": "mean", "higher_is_better": True}
            if "perplexity" in metric["metric"]:
                metric["aggregation"] = (
                    "perplexity" if metric["metric"] == "perplexity" else "weighted_perplexity"
                )
        paths.append(str(folder / f"{name}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(task))
    return paths


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


def differences(ours: Any, asked: list[Any], mine: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """How far two sides are apart on one task; SystemExit where it is more than rounding."""
    kind = asked[0].request_type
    if kind != "generate_until":
        pairs = [(a if kind != "loglikelihood" else a[0], b if kind != "loglikelihood" else b[0])
                 for a, b in zip(mine, theirs, strict=True)]  # fmt: skip
        flags = sum(a[1] != b[1] for a, b in zip(mine, theirs, strict=True) if kind[13:] == "")
        most = max(abs(a - b) / max(1.0, abs(b) / 100) for a, b in pairs)
        found = {"requests": len(asked), "most": max(abs(a - b) for a, b in pairs), "flags": flags}
        if most > CLOSE or flags:
            raise SystemExit(f"{asked[0].task_name}: {found}")
        return found
    parted = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    for i in parted:
        print(f"{asked[i].task_name} {i}: {mine[i]!r} against {theirs[i]!r}")
    if parted:
        raise SystemExit(f"{len(parted)} of {len(asked)} answers differ")
    return {"requests": len(asked), "parted": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
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
        paths = write_tasks(options.data, folder, options.documents)
        asked = {k: v for k, v in requests(paths).items() if k in options.tasks}
        rows = []
        for task, of_task in asked.items():
            rows.append(measure(task, of_task, sides, options.rounds))
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


def measure(task: str, asked: list[Any], sides: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A task's row: differences and seconds of each side, its median over the rounds."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, Any] = {}
    for number in range(rounds):
        answers = {}
        for side, lm in sides.items():
            answers[side], taken = answer(lm, asked)
            seconds[side].append(taken)
        if number == 0:
            for side in list(sides)[1:]:
                found[side] = differences(sides["ours"], asked, answers["ours"], answers[side])
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
