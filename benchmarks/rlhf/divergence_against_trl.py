"""ops.divergence against TRL's GKD loss: values, gradients, memory and time of one step.

TRL 1.16's `generalized_jsd_loss` takes the logits of student and teacher; ours the hidden states
and output weights that they are made of. Both get the same, and TRL's gradients go on to the same
leaves. Times are of one thread, interleaved; peak memory is what torch's allocator counts above the
inputs.

    HF_HUB_OFFLINE=1 python -P benchmarks/rlhf/divergence_against_trl.py --out divergence.json
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from trl.experimental.gkd.gkd_trainer import GKDTrainer

from llama2rt import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0)


def inputs(tokens: int, vocabulary: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and weights of student (leaves) and teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, dims[0]), (vocabulary, dims[0]), (tokens, dims[1]), (vocabulary, dims[1])]
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    for weight in drawn[1::2]:
        weight.mul_(weight.shape[1] ** -0.5)
    drawn[0].requires_grad_(), drawn[1].requires_grad_()
    return drawn


def ours(given: list[Tensor], targets: Tensor, beta: float, temperature: float) -> Tensor:
    return ops.divergence(*given, targets, beta=beta, temperature=temperature).sum()


def theirs(given: list[Tensor], targets: Tensor, beta: float, temperature: float) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight = given
    labels = torch.where(targets >= 0, targets, -100)
    return GKDTrainer.generalized_jsd_loss(
        hidden @ weight.T, teacher_hidden @ teacher_weight.T, labels, beta, temperature, "sum"
    )


def step(loss: Callable[..., Tensor], given: list[Tensor], *settings: Any) -> list[Tensor]:
    value = loss(given, *settings)
    return [value.detach(), *torch.autograd.grad(value, given[:2])]


def agreement(dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of value and gradients, relative to the largest of each."""
    given = inputs(257, 1021, (48, 64), dtype)
    targets = torch.arange(257) % 5 - 1
    worst = {"value": 0.0, "dhidden": 0.0, "dweight": 0.0}
    for beta in BETAS:
        for temperature in TEMPERATURES:
            pair = (step(f, given, targets, beta, temperature) for f in (ours, theirs))
            for name, mine, other in zip(worst, *pair, strict=True):
                difference = float((mine - other).abs().max() / other.abs().max())
                worst[name] = max(worst[name], difference)
    return worst


def peak_bytes(run: Callable[[], Any]) -> int:
    """Allocated at the highest point of `run()`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cost(tokens: int, vocabulary: int, dims: tuple[int, int]) -> dict[str, Any]:
    """CPU seconds and peak memory of a step of each, at beta 0.5."""
    given = inputs(tokens, vocabulary, dims, torch.float32)
    targets = torch.zeros(tokens, dtype=torch.long)
    sides = {"ours": ours, "trl": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(2):
        for name, loss in sides.items():
            begin = time.process_time()
            step(loss, given, targets, 0.5, 1.0)
            seconds[name].append(round(time.process_time() - begin, 3))
    peaks = {
        name: peak_bytes(lambda loss=loss: step(loss, given, targets, 0.5, 1.0))
        for name, loss in sides.items()
    }
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "dims": dims,
        "cpu_seconds": seconds,
        "peak_bytes": peaks,
        "logits_of_both_bytes": 2 * tokens * vocabulary * 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "agreement": {
            str(dtype).removeprefix("torch."): agreement(dtype)
            for dtype in (torch.float64, torch.float32)
        },
        "cost": cost(given.tokens, 32000, (128, 256)),
    }
    print(json.dumps(found, indent=1))
    if given.out:
        record = records.header("cpu") | {"what": __doc__.splitlines()[0], "trl": version("trl")}
        given.out.write_text(json.dumps(record | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
