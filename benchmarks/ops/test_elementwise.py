"""Memory-bound ops against torch eager and Inductor, as parts of this machine's own copy rate.

Each round runs the copy, the peers and then ours, so that all see the same machine; figures are
ratios of medians. Copy means `x.clone()` of one activation. Sizes are far beyond the caches, data
is random. On a CPU the allocator is the process's own: `make bench` keeps malloc's memory for all.

    pytest -s benchmarks/ops
"""

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama2rt.ops import backends

ROUNDS, EPS = 11, 1e-5
SHAPE = {"cpu": (8192, 4096), "cuda": (32768, 8192)}  # 64 MiB and 512 MiB in bf16
HEAD_DIM = 128


@dataclass(frozen=True)
class Case:
    activations: int
    """How many tensors of the shape are read or written: the useful traffic."""
    arguments: tuple
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    """The forward in plain torch, of the first `leaves` arguments after any gradient."""
    leaves: int


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def case(op: str, device: str) -> Case:
    rows, columns = SHAPE[device]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, y, dy = (draw(rows, columns) for _ in range(3))
    weight = draw(columns)
    rstd = torch.rsqrt(x.float().square().mean(-1) + EPS)
    if op == "rms_norm":
        return Case(2, (x, weight, EPS), llama_rms_norm, 2)
    if op == "rms_norm_backward":
        return Case(3, (dy, x, weight, rstd), llama_rms_norm, 2)
    if op == "add_rms_norm":

        def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            summed = x + residual
            return llama_rms_norm(summed, weight), summed

        return Case(4, (x, y, weight, EPS), add_rms_norm, 3)
    if op == "swiglu":
        return Case(3, (x, y), silu_times, 2)
    if op == "swiglu_backward":
        return Case(5, (dy, x, y), silu_times, 2)
    assert op == "rope"
    heads = (rows, columns // 2 // HEAD_DIM, HEAD_DIM)
    q, k = draw(*heads), draw(*heads)
    cos, sin = torch.randn(2, rows, HEAD_DIM // 2, device=device)
    positions = torch.arange(rows, device=device)

    def hugging_face(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        c, s = (torch.cat((t, t), -1)[positions][:, None].bfloat16() for t in (cos, sin))
        halves = (x.chunk(2, -1) for x in (q, k))
        turned = (torch.cat((-second, first), -1) for first, second in halves)
        return tuple(x * c + t * s for x, t in zip((q, k), turned, strict=True))

    return Case(2, (q, k, cos, sin, positions), hugging_face, 2)


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "op",
    ["rms_norm", "rms_norm_backward", "add_rms_norm", "swiglu", "swiglu_backward", "rope"],
)
def test_elementwise(benchmark, capsys, op, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no usable NVIDIA GPU")
    forward_op = op.removesuffix("_backward")
    if device not in backends(device)[forward_op]["native"]:
        pytest.skip(f"the {device} backend has no kernel of its own for {forward_op}")
    chosen = case(op, device)
    native = importlib.import_module(f"llama2rt.ops.{device}").NATIVE[op]
    peers: dict[str, Callable[[], object]] = {}
    for name, function in (("eager", chosen.eager), ("inductor", torch.compile(chosen.eager))):
        if op.endswith("_backward"):
            dy, *inputs = chosen.arguments
            leaves = [x.clone().requires_grad_() for x in inputs[: chosen.leaves]]
            out = function(*leaves)
            peers[name] = lambda out=out, leaves=leaves, dy=dy: torch.autograd.grad(
                out, leaves, dy, retain_graph=True
            )
        else:
            peers[name] = lambda f=function: f(*chosen.arguments[: chosen.leaves])
    activation = chosen.arguments[0]
    runs = {"copy": activation.clone, **peers, "ours": lambda: native(*chosen.arguments)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()

    def others() -> None:
        for name, run in runs.items():
            if name != "ours":
                times[name].append(seconds(run, device))

    benchmark.pedantic(
        lambda: times["ours"].append(seconds(runs["ours"], device)), setup=others, rounds=ROUNDS
    )
    median = {name: statistics.median(values) for name, values in times.items()}
    bytes_each = activation.shape[0] * SHAPE[device][1] * 2
    rate = chosen.activations * bytes_each / median["ours"]
    copy_rate = 2 * activation.nbytes / median["copy"]
    figures = {
        "GB/s": rate / 1e9,
        "percent of copy": 100 * rate / copy_rate,
        "x eager": median["eager"] / median["ours"],
        "x inductor": median["inductor"] / median["ours"],
    }
    drift = max(times["copy"]) / min(times["copy"])
    benchmark.extra_info.update(figures, threads=torch.get_num_threads(), copy_drift=drift)
    with capsys.disabled():
        row = ", ".join(f"{value:.2f} {name}" for name, value in figures.items())
        print(f"\n{op} on {device}: {row} (copy varied by {drift:.2f}x)")
