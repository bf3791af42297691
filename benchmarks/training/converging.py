"""Loss curves of one process and of each parallelism on TinyShakespeare, on top of each other.

Each mesh pretrains the shipped recipe `tinyshakespeare` by the command line, as one process or
under torchrun, in fp32, from one seed; a run that is there is read, one that was stopped goes on.
Rounding grows from step to step: what has to agree to 1e-5 is the beginning, and the rest must not
come apart by more than two seeds would.

    python benchmarks/training/converging.py --data shared/data/tinyshakespeare.txt \\
        --work runs/converging [--steps 300] [--only one "FSDP 2"]

rewrites docs/converging.md and docs/images/converging.svg.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PAGE, FIGURE = ROOT / "docs/converging.md", ROOT / "docs/images/converging.svg"
ALONE = "one process"
FIRST = 20
MESHES: dict[str, tuple[int, dict[str, int]]] = {
    ALONE: (1, {}),
    "FSDP 2": (2, {"shard": 2}),
    "hybrid 2 x 2": (4, {"data": 2, "shard": 2}),
    "TP 2": (2, {"tensor": 2}),
    "CP 2": (2, {"context": 2}),
    "FSDP 2 x TP 2": (4, {"shard": 2, "tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
}


def train(name: str, data: Path, work: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run of `steps`."""
    ranks, degrees = MESHES[name]
    out = work / name.replace(" ", "-")
    command = ["-P", "-m", "llama2rt.cli", "pretrain", "tinyshakespeare", "--out", str(out)]
    command += ["--data", str(data), "--steps", str(steps), "--epochs", "None"]
    # Several micro-batches a step, for pipelines and for the shares of ranks.
    command += ["--train.precision", "fp32", "--train.micro-tokens", "512", "--resume"]
    for dimension, degree in degrees.items():
        command += [f"--parallel.{dimension}", str(degree)]
    start = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    if ranks > 1:
        command = [*start, "--no-python", "--", sys.executable, *command]
    settings = {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, **settings})
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, Any]]) -> np.ndarray:
    """Nats a token of each step, fp64 [steps]."""
    return np.array([row["loss"] for row in rows if "loss" in row])


def draw(curves: Mapping[str, np.ndarray], path: Path) -> None:
    """Losses, and how far each is from one process's."""
    from llama2rt.report.plot import MUTED, SERIES, Plot, canvas

    alone = curves[ALONE]
    step = np.arange(1, len(alone) + 1)
    with canvas(1, 2, height=3.6) as (figure, (left, right)):
        for (name, curve), colour in zip(curves.items(), SERIES, strict=False):
            # One process lies below all others, wide enough to be seen.
            wide = 5.0 if name == ALONE else 1.0
            left.plot(step, curve, color=colour, linewidth=wide, label=name, alpha=0.9)
            if name != ALONE:
                apart = np.maximum(np.abs(curve / alone - 1.0), 1e-9)
                right.plot(step, apart, color=colour, linewidth=1.0, label=name)
        right.axhline(1e-5, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        right.axvline(FIRST, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        right.set_yscale("log")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        left.set_title("loss (nats a token)")
        right.set_title("relative difference from one process")
        for axes in (left, right):
            axes.set_xlabel("step")
        left.legend(fontsize=8)
    Plot(figure, "Loss curves of each mesh", "", (), ()).save(path)


def page(curves: Mapping[str, np.ndarray], bits: Mapping[str, float]) -> str:
    alone = curves[ALONE]
    lines = [
        "# Every mesh learns what one process learns",
        "",
        "Written by `benchmarks/training/converging.py`: the recipe `tinyshakespeare` in fp32 from",
        f"one seed, {len(alone)} steps of 4 micro-batches, as one process and as gloo processes",
        "under torchrun.",
        "",
        "![Loss curves of each mesh and their differences](images/converging.svg)",
        "",
        f"| mesh | last loss | held out, bits a byte | largest difference, steps 1 to {FIRST} | "
        "in all steps |",
        "|---|---|---|---|---|",
    ]
    for name, curve in curves.items():
        apart = np.abs(curve / alone - 1.0)
        differences = (
            "| | |" if name == ALONE else f"| {apart[:FIRST].max():.1e} | {apart.max():.1e} |"
        )
        lines.append(f"| {name} | {curve[-1]:.4f} | {bits[name]:.4f} {differences}")
    lines += [
        "",
        "Differences are relative, in the loss of a step. They come from the order in which sums",
        "are rounded and grow from step to step, as those of two numbers of threads do.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=list(MESHES), default=list(MESHES))
    options = parser.parse_args()
    curves, bits = {}, {}
    for name in (ALONE, *(name for name in options.only if name != ALONE)):
        rows = train(name, options.data, options.work, options.steps)
        curves[name] = losses(rows)
        bits[name] = next(row["bits_per_byte"] for row in reversed(rows) if "bits_per_byte" in row)
    draw(curves, FIGURE)
    PAGE.write_text(page(curves, bits), encoding="utf-8")


if __name__ == "__main__":
    main()
