"""A training step against transformers: 134M parameters, 4 x 512 tokens, CPU (see step.py).

(a) both sides in this process, which keeps its memory (`make bench` sets the allocator);
(b) as shipped, each side in a process of its own, with its own peak memory.
Steps alternate between the sides; a figure is the ratio of medians. The GEMM ceiling is measured
before and after: a run during which it moved by more than a tenth is not worth recording.

    make bench                                      or, alone and without pytest:
    python benchmarks/training/test_training_step.py --out benchmarks/results/MACHINE
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from llama2rt import energy
from llama2rt.checkpoint import hf
from llama2rt.model import Llama, LlamaConfig
from llama2rt.train.metrics import gemm_ceiling

sys.path.insert(0, str(Path(__file__).parent))
import step

ROUNDS, WARM_UP = 5, 2
SETTINGS = ("bf16", "masters")


def weights(folder: Path) -> str:
    """The 134M model with fixed random weights, as a Hugging Face folder that both sides read."""
    model = Llama(LlamaConfig(**step.SHAPE, vocab_size=step.VOCABULARY)).initialize(0)
    hf.save(model, None, folder)
    return str(folder)


def kept_malloc(folder: str, setting: str) -> dict[str, Any]:
    """(a): both sides in this process, in turns."""
    sides = {"theirs": step.theirs(folder, setting), "ours": step.ours(folder, setting)}
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
    return summary(times, losses, used)


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
        for name in ("theirs", "ours")
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
    return {
        **summary(times, losses, used),
        "ours_peak_bytes": peaks["ours"],
        "theirs_peak_bytes": peaks["theirs"],
    }


def summary(
    times: dict[str, list[float]],
    losses: dict[str, list[float]],
    used: dict[str, list[energy.Energy]],
) -> dict[str, Any]:
    # Before the first update the two sides are the same function of the same numbers.
    ours, theirs = losses["ours"][0], losses["theirs"][0]
    if abs(ours - theirs) > 0.01:
        raise AssertionError(f"not the same model: loss {ours} against {theirs}")
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    return {
        "ours_s": medians["ours"],
        "theirs_s": medians["theirs"],
        "ratio": medians["theirs"] / medians["ours"],
        "loss": {"ours": losses["ours"], "theirs": losses["theirs"]},
        "seconds": times,
        "energy": {
            name: energy.in_turn(values[WARM_UP:]).record() for name, values in used.items()
        },
    }


def row(name: str, setting: str, result: dict[str, Any]) -> str:
    config = LlamaConfig(**step.SHAPE, vocab_size=step.VOCABULARY)
    count = step.DOCUMENTS * step.LENGTH
    blocks = config.parameters - config.vocab_size * config.dim
    attention = config.layers * config.dim * step.DOCUMENTS * step.LENGTH**2
    flops = 6 * (blocks * count + attention)
    text = (
        f"{name:<12}{setting:<9}ours {result['ours_s']:6.2f} s  "
        f"transformers {result['theirs_s']:6.2f} s  {result['ratio']:5.2f}x  "
        f"{flops / result['ours_s'] / 1e9:5.0f} GFLOP/s"
    )
    drawn = energy.Energy(**result["energy"]["ours"])
    per_step = drawn.joules_per(ROUNDS)
    if per_step is None:
        text += f"  {drawn.describe()}"
    else:
        text += f"  {per_step:.1f} J/step, {per_step / count:.3g} J/token"
    if "ours_peak_bytes" in result:
        ours, theirs = result["ours_peak_bytes"], result["theirs_peak_bytes"]
        text += f"  peak {ours / 2**30:.2f} against {theirs / 2**30:.2f} GiB"
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("measure", [kept_malloc, as_shipped], ids=["kept", "shipped"])
def test_training_step(benchmark, capsys, folder, measure, setting):
    result = benchmark.pedantic(measure, args=(folder, setting), rounds=1)
    benchmark.extra_info.update(result)
    with capsys.disabled():
        print("\n" + row(measure.__name__, setting, result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder that receives training_step.json")
    out = parser.parse_args().out

    from llama2rt.train.allocator import keep_malloc

    keep_malloc()
    measured: dict[str, Any] = {
        "what": "training step, 134M parameters, 4 x 512 tokens, against transformers",
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    ceiling = gemm_ceiling("cpu", torch.bfloat16)
    with TemporaryDirectory() as temporary:
        model = weights(Path(temporary))
        # Processes of their own first: this one then holds nothing yet.
        for measure in (as_shipped, kept_malloc):
            measured[measure.__name__] = {}
            for setting in SETTINGS:
                result = measure(model, setting)
                measured[measure.__name__][setting] = result
                print(row(measure.__name__, setting, result), flush=True)
    gemm_ceiling.cache_clear()
    measured["gemm_ceiling_flops"] = [ceiling, gemm_ceiling("cpu", torch.bfloat16)]
    drift = measured["gemm_ceiling_flops"][1] / ceiling - 1
    print(f"GEMM ceiling {ceiling / 1e9:.0f} GFLOP/s, {drift:+.0%} after")
    if abs(drift) > 0.1:
        print("the machine was not quiet: do not keep this run", file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "training_step.json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
