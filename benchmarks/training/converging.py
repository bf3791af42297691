"""Loss curves of one process and of each parallelism on TinyShakespeare, on top of each other.

Each mesh pretrains the shipped recipe `tinyshakespeare` with a smaller model by the command line,
as one process or under torchrun, in fp32, of one thread each, from one seed; a run that is there is
read, one that was stopped goes on. Rounding grows from step to step: what has to agree to 1e-5 is
the beginning. How far the rest may come apart says one process that only cuts its batches into
other micro-batches, which is another order of the same sums too.

    python -P benchmarks/training/converging.py --data ../shared/data/tinyshakespeare.txt \\
        --work runs/converging --record build/converging.json [--steps 200] [--only "FSDP 2"]

rewrites docs/converging.md and docs/images/converging.svg.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

ROOT = Path(__file__).resolve().parents[2]
PAGE, FIGURE = ROOT / "docs/converging.md", ROOT / "docs/images/converging.svg"
ALONE, REGROUPED = "one process", "one process, other micro-batches"
FIRST, BOUND = 20, 1e-5
SHAPE = {"dim": 64, "layers": 4, "heads": 4}
CONTEXT, BATCH, MICRO = 128, 1024, 256  # tokens; several micro-batches for pipelines and shares


@dataclass(frozen=True)
class Setup:
    """How a run is spread."""

    ranks: int = 1
    degrees: Mapping[str, int] = field(default_factory=dict)
    micro_tokens: int = MICRO


SETUPS = {
    ALONE: Setup(),
    REGROUPED: Setup(micro_tokens=2 * MICRO),
    "FSDP 2": Setup(2, {"shard": 2}),
    "hybrid 2 x 2": Setup(4, {"data": 2, "shard": 2}),
    "TP 2": Setup(2, {"tensor": 2}),
    "CP 2": Setup(2, {"context": 2}),
    "FSDP 2 x TP 2": Setup(4, {"shard": 2, "tensor": 2}),
    "pipeline 2": Setup(2, {"pipeline": 2}),
}


def train(name: str, data: Path, work: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run of `steps`."""
    setup = SETUPS[name]
    out = work / _folder(name)
    command = ["-P", "-m", "llama2rt.cli", "pretrain", "tinyshakespeare", "--out", str(out)]
    command += ["--data", str(data), "--steps", str(steps), "--epochs", "None", "--resume"]
    command += ["--context", str(CONTEXT), "--batch-tokens", str(BATCH)]
    command += ["--train.precision", "fp32", "--train.micro-tokens", str(setup.micro_tokens)]
    if name != ALONE:  # which has trained it
        command += ["--tokenizer", str(work / _folder(ALONE) / "model"), "--vocab-size", "None"]
    for key, value in SHAPE.items():
        command += [f"--model.{key}", str(value)]
    for dimension, degree in setup.degrees.items():
        command += [f"--parallel.{dimension}", str(degree)]
    if setup.ranks > 1:
        ranks = ["--standalone", "--nproc-per-node", str(setup.ranks), "--no-python", "--"]
        command = ["-P", "-m", "torch.distributed.run", *ranks, sys.executable, *command]
    if not _complete(out, steps):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, env=environment)
    return _rows(out)


def _complete(out: Path, steps: int) -> bool:
    """Whether the run in `out` has ended, after so many steps."""
    manifest = out / "manifest.json"
    ended = manifest.exists() and json.loads(manifest.read_text())["complete"]
    return ended and _rows(out)[-1]["step"] == steps


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _folder(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Curve:
    """What a run has learnt, beside what one process has."""

    loss: np.ndarray
    """nats a token of each step, fp64 [steps]"""
    bits_per_byte: float
    """of the last tenth of the text, after the last step"""

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> "Curve":
        loss = np.array([row["loss"] for row in rows if "loss" in row])
        return cls(loss, [row["bits_per_byte"] for row in rows if "bits_per_byte" in row][-1])

    def apart(self, alone: "Curve") -> np.ndarray:
        """Relative difference of the loss of each step."""
        return np.abs(self.loss / alone.loss - 1.0)


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Losses, and how far each is from one process's."""
    from llama2rt.report.plot import GRID, MUTED, SERIES, Plot, canvas

    alone = curves[ALONE]
    step = np.arange(1, len(alone.loss) + 1)
    with canvas(1, 2, height=3.8) as (figure, (left, right)):
        # Below all others, wide enough to be seen.
        left.plot(step, alone.loss, color=GRID, linewidth=6.0, label=ALONE)
        others = [(name, curve) for name, curve in curves.items() if name != ALONE]
        for (name, curve), colour in zip(others, SERIES, strict=False):
            line = {"color": colour, "linewidth": 1.0, "label": name}
            left.plot(step, curve.loss, **line)
            right.plot(step, np.maximum(curve.apart(alone), 1e-9), **line)
        right.axhline(BOUND, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        right.axvline(FIRST, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        right.set_yscale("log")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        left.set_title("loss (nats a token)")
        right.set_title("relative difference from one process")
        for axes in (left, right):
            axes.set_xlabel("step")
        left.legend(fontsize=8)
    Plot(figure, "Loss curves of each mesh", "", (), ()).save(path)


def summary(curves: Mapping[str, Curve]) -> dict[str, dict[str, Any]]:
    """The page's numbers by mesh."""
    alone = curves[ALONE]
    found = {}
    for name, curve in curves.items():
        apart = curve.apart(alone)
        beyond = np.flatnonzero(apart > BOUND)
        found[name] = {
            "last_loss": float(curve.loss[-1]),
            "held_out_bits_per_byte": curve.bits_per_byte,
            "largest_difference_of_the_first_steps": float(apart[:FIRST].max()),
            "largest_difference": float(apart.max()),
            "first_step_beyond_1e-5": int(beyond[0]) + 1 if len(beyond) else None,
        }
    return found


def page(curves: Mapping[str, Curve]) -> str:
    shape = "{dim} wide, {layers} layers, {heads} heads".format(**SHAPE)
    lines = [
        "# Every mesh learns what one process learns",
        "",
        "Written by `benchmarks/training/converging.py`: the recipe `tinyshakespeare` with a model",
        f"{shape}, in fp32, from one seed: {len(curves[ALONE].loss)} steps of {BATCH} tokens in",
        f"micro-batches of {MICRO}, as one process and as gloo processes under torchrun, of one",
        "thread each.",
        "",
        "![Loss curves of each mesh and their differences](images/converging.svg)",
        "",
        f"| | last loss | held out, bits a byte | largest difference, steps 1 to {FIRST} | first "
        f"step beyond {BOUND:.0e} | largest difference, all steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary(curves).items():
        cells = [name, f"{row['last_loss']:.4f}", f"{row['held_out_bits_per_byte']:.4f}"]
        if name == ALONE:
            cells += [""] * 3
        else:
            cells += [
                f"{row['largest_difference_of_the_first_steps']:.1e}",
                str(row["first_step_beyond_1e-5"] or "none"),
                f"{row['largest_difference']:.1e}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_words(curves), ""])


def _words(curves: Mapping[str, Curve]) -> list[str]:
    """Where curves part, and why that is no mesh's fault."""
    alone = curves[ALONE]
    apart = np.max([c.apart(alone) for name, c in curves.items() if name != ALONE], axis=0)
    together = int((np.append(apart, 1.0) > BOUND / 10).argmax())
    worst = int(apart.argmax())
    jump = alone.loss[worst] - alone.loss[max(worst - 1, 0)]
    return [
        "Differences are relative, in the loss of a step. They come from the order in which sums",
        f"are rounded: in the first {together} steps they are at most",
        f"{apart[:together].max(initial=0.0):.1e}, the last bits of fp32. The largest is that of",
        f"step {worst + 1}, where one process's own loss changes by {jump:+.2f} from one step to",
        "the next. From there on rounding is not forgotten, since each step begins where the last",
        f'one led: as little for "{REGROUPED}", which adds',
        f"the same gradients up in another order, {2 * MICRO} tokens at a time, and is no mesh.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    given = parser.parse_args()
    curves = {}
    for name in (ALONE, *(name for name in given.only if name != ALONE)):
        curves[name] = Curve.of(train(name, given.data, given.work, given.steps))
    draw(curves, FIGURE)
    PAGE.write_text(page(curves), encoding="utf-8")
    if given.record is not None:
        import records

        found = records.header("cpu") | {
            "what": "losses of one process and of each mesh, `tinyshakespeare` in fp32",
            "shape": SHAPE,
            "context": CONTEXT,
            "batch_tokens": BATCH,
            "micro_tokens": MICRO,
            "runs": summary(curves),
            "loss": {name: curve.loss.tolist() for name, curve in curves.items()},
        }
        given.record.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
