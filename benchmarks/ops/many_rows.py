"""Products of hundreds of bf16 rows on a CPU: `ops.linear` against torch's, forward and backward.

Batches of documents rarely have a number of tokens twice, and oneDNN, which multiplies bf16 for
torch, compiles itself for each number that it meets. So two settings, each side in a process of its
own: the same number of rows every time, and every time another. Rounds alternate between sides;
figures are medians of a round, and what a process has grown by.

    python -P benchmarks/ops/many_rows.py --out benchmarks/results/MACHINE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

# Run as a script with -P, its own folder is missing.
sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("helpers", "training"))

import records

SMOKE = os.environ.get("BENCH_SMOKE") == "1"
ROUNDS = 2 if SMOKE else 40
LEAST = 300 if SMOKE else 2000
"""rows; the others have up to twice as many"""
SHAPES = {
    "quickstart": [(128, 128), (128, 352), (352, 128)],
    "24M": [(288, 288), (288, 768), (768, 288)],
}
"""(inner, columns) of the linear layers"""


def work(side: str, setting: str, shape: str) -> None:
    """A round for each line on stdin: its seconds and the growth of memory so far, MiB."""
    from llama2rt.ops.linear import linear

    product = {"torch": torch.nn.functional.linear, "ours": linear}[side]
    layers = []
    for inner, columns in SHAPES[shape]:
        x = torch.randn(2 * LEAST, inner).bfloat16()
        weight = torch.randn(columns, inner).bfloat16().requires_grad_()
        layers.append((x, weight, torch.randn(2 * LEAST, columns).bfloat16()))
    began = resident()
    for number, _ in enumerate(sys.stdin):
        rows = LEAST - 17 + (number * 37 % LEAST if setting == "another" else 0)
        start = time.perf_counter()
        for x, weight, dy in layers:
            product(x[:rows].requires_grad_(), weight).backward(dy[:rows])
        seconds = time.perf_counter() - start
        print(json.dumps({"rows": rows, "seconds": seconds, "grown": resident() - began}))
        sys.stdout.flush()


def resident() -> float:
    """MiB of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def compare(setting: str, shape: str) -> dict[str, float]:
    command = [sys.executable, "-P", __file__, "--side"]
    workers = {
        side: subprocess.Popen(
            [*command, side, setting, shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in ("torch", "ours")
    }
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    try:
        for _ in range(ROUNDS):
            for side, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("round\n")
                worker.stdin.flush()
                taken[side].append(json.loads(worker.stdout.readline()))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    # Per row, because rounds have different numbers of them; the first round is a warm-up.
    per_row = {
        side: statistics.median(one["seconds"] / one["rows"] for one in rounds[1:])
        for side, rounds in taken.items()
    }
    grown = {f"{side}_grown_mib": rounds[-1]["grown"] for side, rounds in taken.items()}
    microseconds = {f"{side}_microseconds_a_row": 1e6 * one for side, one in per_row.items()}
    return {**microseconds, "ratio": per_row["torch"] / per_row["ours"], **grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder that receives many-rows.json")
    parser.add_argument("--side", nargs=3, help="one side alone: SIDE SETTING SHAPE")
    options = parser.parse_args()
    if options.side:
        return work(*options.side)
    measured = records.header("cpu") | {
        "what": f"bf16 linear layers, forward and backward, {ROUNDS} rounds of {LEAST} to "
        f"{2 * LEAST} rows: the same number, or every time another",
        "versions": records.versions(("torch",)),
    }
    for shape in SHAPES:
        measured[shape] = {setting: compare(setting, shape) for setting in ("same", "another")}
        print(shape, json.dumps(measured[shape], indent=1), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(measured, indent=1) + "\n"
        (options.out / "many-rows.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
