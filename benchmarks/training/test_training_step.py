"""A training step of two shapes against transformers and litgpt: 4 x 512 tokens, CPU (see step.py).

(a) all sides in this process, which keeps its memory (`make bench` sets the allocator);
(b) as shipped, each side in a process of its own, with its own peak memory.
Steps alternate between the sides, which begin with the same loss; a figure is the ratio of medians.
The GEMM ceiling is measured before and after: a run during which it moved by more than a tenth is
not worth recording. Peers that are not installed are left out, with the reason. litgpt is in no
extra of ours, because its bounds (0.5.13: huggingface_hub below 1.4) exclude what others bring:

    pip install --no-deps litgpt lightning pytorch-lightning lightning-utilities torchmetrics \\
        "jsonargparse<=4.41"

    make bench                                      or, alone and without pytest:
    python benchmarks/training/test_training_step.py --out benchmarks/results/MACHINE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from llama2rt import energy
from llama2rt.checkpoint import hf
from llama2rt.model import Llama, LlamaConfig
from llama2rt.train.metrics import gemm_ceiling

# Run as a script, pytest's own paths are missing.
sys.path.extend(str(Path(__file__).parents[n] / room) for n, room in ((0, ""), (1, "helpers")))

import records
import step

ROUNDS, WARM_UP = (1, 1) if step.SMOKE else (5, 2)
SETTINGS = ("bf16", "masters")


def config(shape: str) -> LlamaConfig:
    return LlamaConfig(**step.SHAPES[shape], vocab_size=step.VOCABULARY)


def weights(shape: str, folder: Path) -> str:
    """The model with fixed random weights, as a Hugging Face folder that every side reads."""
    hf.save(Llama(config(shape)).initialize(0), None, folder)
    return str(folder)


def present() -> list[str]:
    """The sides that this machine has, ours last."""
    absent = step.missing()
    for name, reason in absent.items():
        print(f"{name} is not beside ours: {reason}")
    return [name for name in step.SIDES if name not in absent]


def kept_malloc(folder: str, setting: str) -> dict[str, Any]:
    """(a): all sides in this process, in turns."""
    sides = {name: step.SIDES[name](folder, setting) for name in present()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[energy.Energy]] = {name: [] for name in sides}
    with energy.of_device(torch.device("cpu")) as meter:
        for _ in range(WARM_UP + ROUNDS):
            for name, take_step in sides.items():
                meter.lap()
                start = time.perf_counter()
                losses[name].append(take_step())
                times[name].append(time.perf_counter() - start)
                used[name].append(meter.lap())
    return summary(setting, times, losses, used)


def as_shipped(folder: str, setting: str) -> dict[str, Any]:
    """(b): each side in its own process with its own allocator, steps in turns."""
    script = str(Path(step.__file__))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    workers = {
        name: subprocess.Popen(
            [sys.executable, script, name, setting, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in present()
    }
    times: dict[str, list[float]] = {name: [] for name in workers}
    losses: dict[str, list[float]] = {name: [] for name in workers}
    peaks: dict[str, int] = {}
    used: dict[str, list[energy.Energy]] = {name: [] for name in workers}
    with energy.of_device(torch.device("cpu")) as meter:
        for _ in range(WARM_UP + ROUNDS):
            for name, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                meter.lap()
                worker.stdin.write("step\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise RuntimeError(f"{name} died with status {worker.wait()}")
                used[name].append(meter.lap())
                result = json.loads(line)
                times[name].append(result["seconds"])
                losses[name].append(result["loss"])
                peaks[name] = result["peak"]
    for worker in workers.values():
        worker.communicate()
    return summary(setting, times, losses, used) | {"peak_bytes": peaks}


def summary(
    setting: str,
    times: dict[str, list[float]],
    losses: dict[str, list[float]],
    used: dict[str, list[energy.Energy]],
) -> dict[str, Any]:
    # Before the first update all sides are the same function of the same numbers.
    first = {name: values[0] for name, values in losses.items()}
    for name, loss in first.items():
        # A model in bf16 gives litgpt a loss in bf16, summed and divided there: 2^-8 each.
        rounding = 2**-7 * loss if (name, setting) == ("litgpt", "bf16") else 0
        if abs(loss - first["ours"]) > 0.01 + rounding:
            raise AssertionError(f"not the same model: losses {first}")
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    return {
        "median_s": medians,
        "ratio": {name: s / medians["ours"] for name, s in medians.items() if name != "ours"},
        "loss": losses,
        "energy": {
            name: energy.in_turn(values[WARM_UP:]).record() for name, values in used.items()
        },
        "seconds": times,
    }


def row(shape: str, name: str, setting: str, result: dict[str, Any]) -> str:
    model, count = config(shape), step.DOCUMENTS * step.LENGTH
    blocks = model.parameters - model.vocab_size * model.dim
    attention = model.layers * model.dim * step.DOCUMENTS * step.LENGTH**2
    rate = 6 * (blocks * count + attention) / result["median_s"]["ours"]
    text = f"{shape:<6}{name:<12}{setting:<9}ours {result['median_s']['ours']:6.3f} s"
    for peer, ratio in result["ratio"].items():
        text += f"  {peer} {result['median_s'][peer]:6.3f} s {ratio:5.2f}x"
    text += f"  {rate / 1e9:5.0f} GFLOP/s"
    for side, peak in result.get("peak_bytes", {}).items():
        text += f"  peak {side} {peak / 2**30:.2f} GiB"
    drawn = energy.Energy(**result["energy"]["ours"])
    per_step = drawn.joules_per(ROUNDS)
    if per_step is None:
        return f"{text}  {drawn.describe()}"
    return f"{text}  {per_step:.1f} J/step, {per_step / count:.3g} J/token"


@pytest.fixture(scope="module", params=step.SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(name of the shape, folder of its weights)."""
    return request.param, weights(request.param, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("measure", [kept_malloc, as_shipped], ids=["kept", "shipped"])
def test_training_step(benchmark, capsys, model, measure, setting):
    shape, folder = model
    with capsys.disabled():
        print()
        result = benchmark.pedantic(measure, args=(folder, setting), rounds=1)
        print(row(shape, measure.__name__, setting, result))
    benchmark.extra_info.update(result)


def record(shape: str) -> dict[str, Any]:
    """All of one shape, and the ceiling around it."""
    measured: dict[str, Any] = records.header("cpu") | {
        "what": f"training step, {shape} parameters, {step.DOCUMENTS} x {step.LENGTH} tokens",
        "versions": records.versions(("torch", "transformers", "litgpt")),
        "absent": step.missing(),
    }
    gemm_ceiling.cache_clear()
    ceiling = gemm_ceiling("cpu", torch.bfloat16)
    with TemporaryDirectory() as temporary:
        folder = weights(shape, Path(temporary))
        # Processes of their own first: this one then holds nothing yet.
        for measure in (as_shipped, kept_malloc):
            measured[measure.__name__] = {}
            for setting in SETTINGS:
                result = measure(folder, setting)
                measured[measure.__name__][setting] = result
                print(row(shape, measure.__name__, setting, result), flush=True)
    gemm_ceiling.cache_clear()
    measured["gemm_ceiling_flops"] = [ceiling, gemm_ceiling("cpu", torch.bfloat16)]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder that receives training-step-SHAPE.json")
    parser.add_argument("--shape", choices=step.SHAPES, help="one shape alone")
    options = parser.parse_args()

    from llama2rt.train.allocator import keep_freed_memory

    keep_freed_memory()
    for shape in [options.shape] if options.shape else step.SHAPES:
        measured = record(shape)
        before, after = measured["gemm_ceiling_flops"]
        drift = after / before - 1
        print(f"GEMM ceiling {before / 1e9:.0f} GFLOP/s, {drift:+.0%} after")
        if abs(drift) > 0.1 and not step.SMOKE:
            print("the machine was not quiet: this run is not kept", file=sys.stderr)
        elif options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"training-step-{shape}.json"
            path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
