"""Memory-bound ops against torch eager and Inductor, as parts of this machine's own copy rate.

On a GPU also against Liger-Kernel and NVIDIA apex where they are installed; there, `cuda` and
`triton` are timed side by side. Each round runs the copy, the peers and then ours, so that all see
the same machine; figures are ratios of medians. Copy means `x.clone()` of one activation. Sizes are
far beyond the caches, data is random. On a CPU the allocator is the process's own: `make bench`
keeps malloc's memory for all.

    pytest -s benchmarks/ops
"""

import importlib
import importlib.util
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
OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


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


def installed_peers(op: str) -> dict[str, Callable]:
    """Forward functions of GPU libraries for the arguments that `Case.eager` takes."""
    found: dict[str, Callable] = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        # Not in place: neither is ours. (Liger's SwiGLU gradient always is.)
        if op == "rms_norm":
            found["liger"] = lambda x, w: liger.liger_rms_norm(x, w, EPS, 0.0, "llama", False)
        elif op == "add_rms_norm" and hasattr(liger, "liger_fused_add_rms_norm"):
            found["liger"] = lambda x, r, w: liger.liger_fused_add_rms_norm(
                x, r, w, EPS, 0.0, "llama", False
            )
        elif op == "swiglu":
            found["liger"] = liger.liger_swiglu
    if op == "rms_norm" and importlib.util.find_spec("apex"):
        try:
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine
        except ImportError:  # PyPI's apex, which is another project, or a build without extensions
            return found
        found["apex"] = lambda x, w: fused_rms_norm_affine(x, w, w.shape, EPS)
    return found


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is kept busy while the host gets its launches ready: they are not timed.
        torch.cuda._sleep(2_000_000)
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
    ours = [name for name in OURS[device] if name in backends(device)[forward_op]["native"]]
    if not ours:
        pytest.skip(f"no kernel of our own for {forward_op} on {device}")
    chosen = case(op, device)
    runs: dict[str, Callable[[], object]] = {"copy": chosen.arguments[0].clone}
    functions = {"eager": chosen.eager, "inductor": torch.compile(chosen.eager)}
    if device == "cuda":
        functions |= installed_peers(forward_op)
    for name, function in functions.items():
        if op.endswith("_backward"):
            dy, *inputs = chosen.arguments
            leaves = [x.clone().requires_grad_() for x in inputs[: chosen.leaves]]
            out = function(*leaves)
            runs[name] = lambda out=out, leaves=leaves, dy=dy: torch.autograd.grad(
                out, leaves, dy, retain_graph=True
            )
        else:
            runs[name] = lambda f=function: f(*chosen.arguments[: chosen.leaves])
    for name in ours:
        native = importlib.import_module(f"llama2rt.ops.{name}").NATIVE[op]
        runs[name] = lambda f=native: f(*chosen.arguments)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()

    def time_one(name: str) -> None:
        times[name].append(seconds(runs[name], device))

    def time_others() -> None:
        for name in runs:
            if name != ours[0]:
                time_one(name)

    benchmark.pedantic(lambda: time_one(ours[0]), setup=time_others, rounds=ROUNDS)
    median = {name: statistics.median(values) for name, values in times.items()}
    activation = chosen.arguments[0]
    bytes_moved = chosen.activations * activation.shape[0] * SHAPE[device][1] * 2
    copy_rate = 2 * activation.nbytes / median["copy"]
    drift = max(times["copy"]) / min(times["copy"])
    benchmark.extra_info.update(threads=torch.get_num_threads(), copy_drift=drift)
    for name in ours:
        rate = bytes_moved / median[name]
        figures = {"GB/s": rate / 1e9, "percent of copy": 100 * rate / copy_rate}
        figures |= {f"x {peer}": median[peer] / median[name] for peer in functions}
        benchmark.extra_info[name] = figures
        with capsys.disabled():
            row = ", ".join(f"{value:.2f} {unit}" for unit, value in figures.items())
            print(f"\n{op} on {device} by {name}: {row} (copy varied by {drift:.2f}x)")
