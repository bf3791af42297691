"""Packed attention, forward and backward, against torch's SDPA and as part of the GEMM ceiling.

Each round runs the GEMM, the peers and then ours, so that all see the same machine; figures are
ratios of medians. `flash` is SDPA's flash kernel, forced by name, one call per length of document;
`eager` the formulation with an fp32 softmax. FLOPs are those that causality leaves, 2 products
forward and 5 backward; the ceiling is a 2048 x 2048 x 2048 GEMM in the same dtype. bf16.

    pytest -s benchmarks/ops/test_attention.py
"""

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama2rt.ops import backends

ROUNDS = 7
GEMM = 2048


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "4 x 512": Shape((512,) * 4, 12, 12, 64),
    "1 x 2048 grouped": Shape((2048,), 8, 2, 128),
    "ragged": Shape((1024, 37, 203, 384, 113, 287), 12, 12, 64),
}


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return p.to(q.dtype) @ v


def batches(shape: Shape, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    """Packed [T, h, D] as what SDPA takes: [n, h, length, D] for each run of equal lengths."""
    parts, start = [], 0
    for length, run in itertools.groupby(shape.lengths):
        count = len(list(run))
        rows = slice(start, start + count * length)
        parts.append(tuple(x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in packed))
        start = rows.stop
    return parts


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention(benchmark, capsys, name, direction):
    if "cpu" not in backends("cpu")["attention"]["native"]:
        pytest.skip("the cpu backend has no kernel of its own for attention")
    native = importlib.import_module("llama2rt.ops.cpu")
    shape = SHAPES[name]
    tokens = sum(shape.lengths)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim).bfloat16()

    q, dout = draw(shape.heads), draw(shape.heads)
    k, v = draw(shape.kv_heads), draw(shape.kv_heads)
    cu = torch.tensor([0, *itertools.accumulate(shape.lengths)])
    rest = (cu, cu, max(shape.lengths), True, 1 / math.sqrt(shape.head_dim))
    left, right = torch.randn(2, GEMM, GEMM).bfloat16().unbind()
    runs: dict[str, Callable[[], object]] = {"gemm": lambda: left @ right}
    for peer in (flash, eager):
        if direction == "forward":
            parts = batches(shape, q, k, v)
            runs[peer.__name__] = lambda peer=peer, parts=parts: [peer(*part) for part in parts]
            continue
        leaves = [
            (*(x.clone().requires_grad_() for x in part[:3]), part[3])
            for part in batches(shape, q, k, v, dout)
        ]
        outs = [peer(*part[:3]) for part in leaves]
        runs[peer.__name__] = lambda outs=outs, leaves=leaves: [
            torch.autograd.grad(out, part[:3], part[3], retain_graph=True)
            for out, part in zip(outs, leaves, strict=True)
        ]
    if direction == "forward":
        runs["ours"] = lambda: native.attention(q, k, v, *rest)
    else:
        out, lse = native.attention(q, k, v, *rest)
        runs["ours"] = lambda: native.attention_backward(dout, q, k, v, out, lse, *rest)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()

    def others() -> None:
        for key, run in runs.items():
            if key != "ours":
                times[key].append(seconds(run))

    benchmark.pedantic(
        lambda: times["ours"].append(seconds(runs["ours"])), setup=others, rounds=ROUNDS
    )
    median = {key: statistics.median(values) for key, values in times.items()}
    pairs = sum(n * (n + 1) // 2 for n in shape.lengths)
    products = 2 if direction == "forward" else 5
    rate = products * 2 * pairs * shape.heads * shape.head_dim / median["ours"]
    ceiling = 2 * GEMM**3 / median["gemm"]
    figures = {
        "ms": median["ours"] * 1e3,
        "GFLOP/s": rate / 1e9,
        "percent of GEMM": 100 * rate / ceiling,
        "x flash": median["flash"] / median["ours"],
        "x eager": median["eager"] / median["ours"],
    }
    drift = max(times["gemm"]) / min(times["gemm"])
    benchmark.extra_info.update(figures, threads=torch.get_num_threads(), gemm_drift=drift)
    with capsys.disabled():
        row = ", ".join(f"{value:.2f} {key}" for key, value in figures.items())
        print(f"\n{name} {direction}: {row} (GEMM varied by {drift:.2f}x)")
