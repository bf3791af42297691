"""A reward step against TRL's RewardTrainer, on pairs whose sides share a prompt of 256 tokens.

Each side works in a process of its own, as shipped, with its own peak memory; steps alternate
between them, and the losses of their first step must agree. Settings (`reward_sides.py`): each as
shipped, all keep their activations, or all compute them again. A figure is the ratio of medians, in
wall time and in CPU time, which counts where the machine is not quiet. Shapes: those of `step.py`,
with its vocabulary, and the quickstart's.

    python -P benchmarks/training/reward_step.py --out benchmarks/results/MACHINE
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Run as a script with -P, its own folder is missing.
sys.path.extend(str(Path(__file__).parents[n] / folder) for n, folder in ((0, ""), (1, "helpers")))

import records
import reward_sides
import step

from llama2rt.checkpoint import hf
from llama2rt.model import LlamaConfig, ScalarModel
from llama2rt.quickstart.recipe import QuickstartRecipe

QUICKSTART = "quickstart"
SHAPES = ("smoke",) if step.SMOKE else (QUICKSTART, "134M", "24M")
ROUNDS, WARM_UP = (1, 1) if step.SMOKE else (5, 2)
CLOSE = {"fp32": 1e-4, "bf16": 2e-2}
"""how far losses of the first step may be apart"""


def config(shape: str, vocabulary: int) -> LlamaConfig:
    """That of the quickstart, or one of `step.SHAPES` with such a vocabulary."""
    if shape == QUICKSTART:
        return dataclasses.replace(QuickstartRecipe().shape, context=1024)
    return LlamaConfig(**step.SHAPES[shape], vocab_size=vocabulary)


def weights(shape: str, folder: Path) -> str:
    """The reward model with fixed random weights, as a folder that every side reads."""
    hf.save(ScalarModel(config(shape, step.VOCABULARY)).initialize(0), None, folder)
    return str(folder)


def compare(folder: str, setting: str, pairs: int, rounds: int, precision: str) -> dict[str, Any]:
    """Medians, ratios to ours, peaks and all that was measured, by side."""
    script = str(Path(reward_sides.__file__))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    workers = {
        side: subprocess.Popen(
            [sys.executable, "-P", script, side, setting, folder, str(pairs), precision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for side in reward_sides.SIDES
    }
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    try:
        for _ in range(WARM_UP + rounds):
            for side, worker in workers.items():
                taken[side].append(take_step(side, worker))
                print(side, json.dumps(taken[side][-1]), file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return summary(taken, CLOSE[precision])


def take_step(side: str, worker: subprocess.Popen) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{side} died with status {worker.wait()}")
    result: dict[str, float] = json.loads(line)
    return result


def summary(taken: dict[str, list[dict[str, float]]], close: float) -> dict[str, Any]:
    # Before the first update all sides are the same function of the same numbers.
    first = {side: results[0]["loss"] for side, results in taken.items()}
    if max(first.values()) - min(first.values()) > close:
        raise AssertionError(f"not the same model and pairs: losses {first}")
    measured: dict[str, Any] = {"steps": taken}
    for key in ("seconds", "cpu_seconds"):
        medians = {
            side: statistics.median(result[key] for result in results[WARM_UP:])
            for side, results in taken.items()
        }
        measured[key] = medians
        measured[f"trl_over_{key}"] = {
            side: medians["trl"] / medians[side] for side in medians if side != "trl"
        }
    peaks = {side: results[-1]["peak"] for side, results in taken.items()}
    measured["peak_bytes"] = peaks
    measured["peak_of_trl"] = {side: peaks[side] / peaks["trl"] for side in peaks if side != "trl"}
    return measured


def row(shape: str, setting: str, result: dict[str, Any]) -> str:
    text = f"{shape:<6}{setting:<12}"
    for side, seconds in result["seconds"].items():
        text += f"{side} {seconds:.2f} s ({result['cpu_seconds'][side]:.2f} of CPU), "
        text += f"{result['peak_bytes'][side] / 2**30:.2f} GiB  "
    for side, ratio in result["trl_over_seconds"].items():
        cpu, peak = result["trl_over_cpu_seconds"][side], result["peak_of_trl"][side]
        text += f"| {side}: {ratio:.2f}x ({cpu:.2f}x in CPU time), memory {peak:.2f} "
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder that receives reward-step-SHAPE.json")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[-1])
    parser.add_argument("--setting", choices=reward_sides.SETTINGS, help="one setting alone")
    parser.add_argument("--pairs", type=int, default=reward_sides.PAIRS, help="in a batch")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps counted")
    parser.add_argument("--precision", choices=CLOSE, default="fp32")
    options = parser.parse_args()
    measured: dict[str, Any] = records.header("cpu") | {
        "what": f"reward step, {options.shape} shape, {options.pairs} pairs, prompts of "
        f"{reward_sides.PROMPT} tokens, responses of {reward_sides.RESPONSES}, {options.precision}",
        "versions": records.versions(("torch", "transformers", "trl")),
    }
    with TemporaryDirectory() as temporary:
        folder = weights(options.shape, Path(temporary))
        for setting in [options.setting] if options.setting else reward_sides.SETTINGS:
            result = compare(folder, setting, options.pairs, options.rounds, options.precision)
            measured[setting] = result
            print(row(options.shape, setting, result), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        suffix = "" if options.precision == "fp32" else f"-{options.precision}"
        path = options.out / f"reward-step-{options.shape}{suffix}.json"
        path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
