"""`llama2rt iterate` killed at random moments: are its models and numbers those of a whole run?

    python tests/helpers/kill_plan.py --kills 40 --seed 0

makes a small world (`pocket`), carries out the paper's V1 to V5 with a refresh of both reward
models before each version, once whole; then again, killed (SIGKILL) at moments drawn uniformly
from the whole run's wall time and resumed after each, in as many runs as the kills need. Exit
status 1 where a model, a file of comparisons or a number of a report is another one.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pocket
import tomli_w
import torch

from llama2rt.annotate import AnswerPair, Judgement
from llama2rt.data.readers import write
from llama2rt.text.tokenizer import Tokenizer

TRAIN = {"log_every": 2, "checkpoint_every": 2, "validate_every": 0}
# Rates so low that the policy stays undecided: it must give annotators two answers to the end.
DEFAULTS: dict[str, Any] = {
    "annotate": {"annotator": {"python": "kill_plan:annotator"}, "temperatures": [1.0, 0.9]},
    "reward": {"batch_size": 16, "epochs": 2, "train": {**TRAIN, "lr": 3e-3}},
    "rejection": {"samples": 2, "epochs": 1, "batch_size": 8, "train": {**TRAIN, "lr": 1e-4}},
    "ppo": {
        "iterations": 2,
        "batch_size": 16,
        "mini_batch_size": 8,
        "train": {**TRAIN, "lr": 1e-4, "log_every": 1, "checkpoint_every": 1},
    },
}


class Knowing:
    """An annotator who knows the right answers of `pocket` and tosses a coin between equals."""

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        random_numbers = random.Random(seed)
        return [self._judgement(pair, random_numbers) for pair in pairs]

    def _judgement(self, pair: AnswerPair, random_numbers: random.Random) -> Judgement:
        kind = pair.prompt.kind
        first, second = (pocket.correct(kind, text) for text in (pair.first, pair.second))
        coin = random_numbers.random() < 0.5
        safe = (first, second) if kind == "safety" else (None, None)
        return Judgement(
            "first" if first > second or (first == second and coin) else "second",
            "significantly_better" if first != second else "negligibly_better",
            *safe,
        )


def annotator() -> Knowing:
    """As the plan names it."""
    return Knowing()


def world(folder: Path, versions: int) -> Path:
    """A policy that tosses coins, prompts, and the plan of so many versions; returns its file."""
    torch.set_num_threads(1)
    texts = [
        f"[INST] {pocket.QUESTIONS[kind].format(name)} [/INST] {answer} "
        for name in pocket.NAMES
        for kind, answers in pocket.ANSWERS.items()
        for answer in answers
    ]
    tokenizer = Tokenizer.train(texts, 320, folder / "tokenizer")
    pocket.fine_tune(folder / "sft", tokenizer)
    write(folder / "prompts.jsonl", pocket.prompts(pocket.TRAINING[:16]))
    write(folder / "held_out.jsonl", pocket.prompts(pocket.HELD_OUT[:12]))
    plan = {
        "sft": str(folder / "sft"),
        "data": [str(folder / "prompts.jsonl")],
        "validation": [str(folder / "held_out.jsonl")],
        "versions": versions,
        "pool_from": min(4, versions),
        "sampling": {"max_tokens": 6},
        "defaults": DEFAULTS,
    }
    path = folder / "plan.toml"
    path.write_text(tomli_w.dumps(plan))
    return path


def start(plan: Path, out: Path) -> "subprocess.Popen[str]":
    """The command, in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llama2rt.cli", "iterate", plan, "--out", out, "--resume"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> None:
    """Wait for the command. RuntimeError with what it said where it fails."""
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {said[-3000:]}")


def whole_run(plan: Path, out: Path) -> tuple[float, float]:
    """Carry the plan out undisturbed; returns (seconds until its first step began, in all)."""
    begin = time.monotonic()
    process = start(plan, out)
    while not any(out.glob("*/manifest.json")) and process.poll() is None:
        time.sleep(0.02)
    ready = time.monotonic() - begin
    finish(process)
    return ready, time.monotonic() - begin


def killed_run(plan: Path, out: Path, moments: Sequence[float], ready: float) -> int:
    """Carry the plan out, killed at each of `moments` (seconds of the whole run's time, ascending)
    and resumed; returns how many kills met a running process.

    `ready`: how long a resumed command takes to begin, which is no progress.
    """
    kills, reached = 0, 0.0
    for moment in moments:
        process = start(plan, out)
        try:
            process.communicate(timeout=moment - reached + (ready if reached else 0.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"status {process.returncode} after {kills} kills in {out}")
        reached = moment
    finish(start(plan, out))
    return kills


def results(out: Path) -> dict[str, Any]:
    """What must be the same: hashes of models and comparisons, numbers of reports."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if (path.name == "model.safetensors" and path.parent.name == "model") or (
            path.suffix == ".jsonl" and path.name.endswith(("pairs.jsonl", *_comparisons()))
        ):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "report.json":
            found[name] = without_times(json.loads(path.read_text()), str(out))
    return found


def _comparisons() -> tuple[str, ...]:
    return "training.jsonl", "held_out.jsonl"


def without_times(value: Any, out: str) -> Any:
    """`value` without what a clock or an energy meter decides, and without where it was run."""
    if isinstance(value, dict):
        measured = ("second", "joule", "energy", "memory", "mfu")
        return {
            key: without_times(item, out)
            for key, item in value.items()
            if not any(word in key for word in measured)
        }
    if isinstance(value, list):
        return [without_times(item, out) for item in value]
    return value.replace(out, "OUT") if isinstance(value, str) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )


def main() -> int:
    """Print a line for each run, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--kills-a-run", type=int, default=5)
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = world(folder, given.versions)
        ready, seconds = whole_run(plan, folder / "whole")
        expected = results(folder / "whole")
        print(f"whole: {seconds:.0f} s ({ready:.1f} s to begin), {len(expected)} results")
        kills, wrong = 0, 0
        while kills < given.kills:
            count = min(given.kills_a_run, given.kills - kills)
            drawn = sorted(moments.uniform(0, seconds) for _ in range(count))
            out = folder / f"killed-after-{kills}"
            kills += killed_run(plan, out, drawn, ready)
            different = differences(expected, results(out))
            wrong += len(different)
            at = ", ".join(f"{moment:.1f}" for moment in drawn)
            print(f"{kills} kills (at {at} s): {len(different)} differ {different}", flush=True)
        print(f"{kills} kills: {wrong} of {len(expected)} results differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
