"""Memory-bound ops against eager torch, Inductor and, on a GPU, what libraries have for them.

Rates count each operand once: what has to be read and written, whatever a contender does. The
ceiling is `x.clone()` of one activation. bf16.

    pytest -s benchmarks/ops/test_elementwise.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICES, SMOKE, Case, Contender, SetUp, compare, inductor, on, ours_for
from peers import EPS
from torch import Tensor

from llama2rt import ops

HEAD_DIM = 128
# (rows, columns): 4 to 64 MiB an activation on a CPU, 32 to 512 on a GPU.
SIZES = {
    "cpu": [(512, 4096), (2048, 4096), (8192, 4096)],
    "cuda": [(2048, 8192), (8192, 8192), (32768, 8192)],
}
SMOKE_SIZES = [(3, 512)]


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


def add_llama_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return llama_rms_norm(summed, weight), summed


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def hugging_face_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [T, h, D], tables [T, 1, D] in their dtype."""
    halves = (x.chunk(2, -1) for x in (q, k))
    turned = (torch.cat((-second, first), -1) for first, second in halves)
    return tuple(x * cos + t * sin for x, t in zip((q, k), turned, strict=True))


@dataclass(frozen=True)
class Op:
    traffic: dict[str, int]
    """Direction -> how many activations are read or written."""
    eager: Callable
    ours: Callable
    library: Callable | None = None
    """torch's own fused function, where there is one."""


OPS = {
    "rms_norm": Op(
        {"forward": 2, "backward": 3},
        llama_rms_norm,
        lambda x, w: ops.rms_norm(x, w, EPS),
        lambda x, w: F.rms_norm(x, w.shape, w, EPS),
    ),
    "add_rms_norm": Op(
        {"forward": 4, "backward": 4},
        add_llama_rms_norm,
        lambda x, r, w: ops.add_rms_norm(x, r, w, EPS),
    ),
    "swiglu": Op({"forward": 3, "backward": 5}, silu_times, ops.swiglu),
    "rope": Op({"forward": 2, "backward": 2}, hugging_face_rope, ops.rope),
}


def row_wise(name: str, rows: int, columns: int, device: str, ours: list[str]) -> SetUp:
    """rms_norm, add_rms_norm and swiglu."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    op = OPS[name]
    inputs = {
        "rms_norm": lambda: (draw(rows, columns), draw(columns)),
        "add_rms_norm": lambda: (draw(rows, columns), draw(rows, columns), draw(columns)),
        "swiglu": lambda: (draw(rows, columns), draw(rows, columns)),
    }[name]()
    upstream = tuple(draw(rows, columns) for _ in range(2 if name == "add_rms_norm" else 1))
    functions = {backend: on(backend, op.ours) for backend in ours}
    functions |= {"eager": op.eager, "inductor": inductor(op.eager)}
    if op.library is not None:
        functions["F." + name] = op.library
    functions |= peers.functions(name, device)
    contenders = {key: Contender(f, inputs, upstream) for key, f in functions.items()}
    return SetUp(inputs[0].clone, contenders)


def rotary(rows: int, columns: int, device: str, ours: list[str]) -> SetUp:
    """q and k of half the columns each; every contender reads tables made beforehand."""
    heads = (rows, columns // 2 // HEAD_DIM, HEAD_DIM)
    q, k, dq, dk = (torch.randn(heads, device=device).bfloat16() for _ in range(4))
    angles = torch.rand(rows, HEAD_DIM // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(rows, device=device)
    wide = [torch.cat((t, t), -1).bfloat16() for t in (cos, sin)]
    theirs = [t[:, None] for t in wide]

    def plain(function: Callable) -> Callable:
        return lambda q, k: function(q, k, *theirs)

    contenders = {
        name: Contender(
            on(name, lambda q, k: ops.rope(q, k, cos, sin, positions)), (q, k), (dq, dk)
        )
        for name in ours
    }
    for name, function in (
        ("eager", hugging_face_rope),
        ("inductor", inductor(hugging_face_rope)),
    ):
        contenders[name] = Contender(plain(function), (q, k), (dq, dk))
    batched = [x.transpose(0, 1)[None] for x in (q, k, dq, dk)]
    for name, function in peers.functions("rope", device).items():
        contenders[name] = Contender(
            lambda q, k, f=function: f(q, k, *(t[None] for t in wide)),
            tuple(batched[:2]),
            tuple(batched[2:]),
        )
    x = torch.randn(rows, columns, device=device).bfloat16()
    return SetUp(x.clone, contenders)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("index", range(1 if SMOKE else 3))
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_elementwise(benchmark, capsys, device, name, index, direction):
    ours = ours_for(name, device)
    sizes = SMOKE_SIZES if SMOKE else SIZES[device]
    rows, columns = sizes[index]
    activation = 2 * rows * columns  # bytes

    def set_up() -> SetUp:
        if name == "rope":
            return rotary(rows, columns, device, ours)
        return row_wise(name, rows, columns, device, ours)

    traffic = OPS[name].traffic[direction]
    case = Case(
        op=name,
        direction=direction,
        device=device,
        size=f"{rows} x {columns} bf16",
        x=activation,
        axis="bytes of one activation",
        work=traffic * activation,
        unit="bytes",
        ceiling="clone",
        ceiling_work=2 * activation,
        set_up=set_up,
        input_bytes=traffic * activation,
        judged=index == len(sizes) - 1 and not SMOKE,
    )
    compare(benchmark, capsys, case, ours)
