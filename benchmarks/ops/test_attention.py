"""Attention over packed documents and over a paged cache, against torch's SDPA and flash-attn.

`flash` and `cudnn` are SDPA's kernels of these names, forced, one call per run of documents of
equal length; `eager` the formulation with an fp32 softmax. FLOPs are those that causality leaves, 2
products forward and 5 backward; the ceiling is a square GEMM. Decoding counts the bytes of the
cache it must read and is held against `clone` of as many; its peers read dense caches, which no
engine has, in SDPA's own layout. bf16.

    pytest -s benchmarks/ops/test_attention.py
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import peers
import pytest
import torch
import torch.nn.functional as F
import work
from measure import DEVICES, SMOKE, Case, Contender, SetUp, compare, inductor, on, ours_for
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama2rt import ops


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    on_curve: bool = True
    eager: bool = True
    """Whether all scores of all heads fit memory beside the rest."""


def grouped(length: int) -> Shape:
    return Shape((length,), 8, 2, 128)


# A curve's shapes differ in the length of the document alone; the others are there for the table.
SHAPES = {
    "cpu": {
        "1 x 256 grouped": grouped(256),
        "1 x 512 grouped": grouped(512),
        "1 x 1024 grouped": grouped(1024),
        "1 x 2048 grouped": grouped(2048),
        "4 x 512": Shape((512,) * 4, 12, 12, 64, on_curve=False),
        "ragged": Shape((1024, 37, 203, 384, 113, 287), 12, 12, 64, on_curve=False),
    },
    "cuda": {
        "8 x 2048": Shape((2048,) * 8, 32, 32, 128),
        "2 x 8192": Shape((8192,) * 2, 32, 32, 128, eager=False),
        "1 x 16384": Shape((16384,), 32, 32, 128, eager=False),
        "2 x 8192 grouped": Shape((8192,) * 2, 32, 8, 128, on_curve=False, eager=False),
        "ragged": Shape((4096, 37, 8192, 384, 1113, 287), 32, 8, 128, False, False),
    },
}
if SMOKE:
    SHAPES = {device: {"smoke": Shape((9, 9, 3), 4, 2, 64)} for device in DEVICES}
GEMM = {"cpu": 64 if SMOKE else 2048, "cuda": 8192}
DIRECTIONS = {
    "cpu": ("forward", "backward"),
    # Targets of GPUs speak of both together; backward alone would be the difference.
    "cuda": ("forward", "forward + backward"),
}


def sdpa(*backends: SDPBackend) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(backends)):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return call


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return p.to(q.dtype) @ v


def runs_of(shape: Shape, packed: Tensor) -> list[Tensor]:
    """Packed [T, h, D] as what SDPA takes: [n, h, length, D] for each run of equal lengths."""
    parts, start = [], 0
    for length, run in itertools.groupby(shape.lengths):
        count = len(list(run))
        rows = packed[start : start + count * length]
        parts.append(rows.unflatten(0, (count, length)).transpose(1, 2))
        start += count * length
    return parts


def by_runs(function: Callable) -> Callable:
    """`function` of q, k and v for each run; takes all q, then all k, then all v."""

    def call(*parts: Tensor) -> list[Tensor]:
        third = len(parts) // 3
        return [function(*parts[i::third]) for i in range(third)]

    return call


def attention(shape: Shape, device: str, ours: list[str]) -> SetUp:
    tokens = sum(shape.lengths)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device).bfloat16()

    q, k, v, dout = (draw(n) for n in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads))
    bounds = [0, *itertools.accumulate(shape.lengths)]
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(shape.lengths)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, cu, max_seqlen=longest)

    contenders = {name: Contender(on(name, packed), (q, k, v), (dout,)) for name in ours}
    functions = {"flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if device == "cuda":
        functions["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    if shape.eager:
        functions |= {"eager": eager, "inductor": inductor(eager)}
    parts = tuple(part for x in (q, k, v) for part in runs_of(shape, x))
    for name, function in functions.items():
        contenders[name] = Contender(by_runs(function), parts, tuple(runs_of(shape, dout)))
    for name, function in peers.functions("attention", device).items():
        contenders[name] = Contender(
            lambda q, k, v, f=function: f(q, k, v, cu, longest), (q, k, v), (dout,)
        )
    size = GEMM[device]
    left, right = torch.randn(2, size, size, device=device).bfloat16().unbind()
    return SetUp(lambda: left @ right, contenders)


@pytest.mark.parametrize(
    ("device", "name", "direction"),
    [(d, name, way) for d in DEVICES for name in SHAPES[d] for way in DIRECTIONS[d]],
)
def test_attention(benchmark, capsys, device, name, direction):
    ours = ours_for("attention", device)
    shape = SHAPES[device][name]
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    todo = work.attention(direction, name, shape.lengths, *heads)
    tokens, longest = sum(shape.lengths), max(shape.lengths)
    case = Case(
        op="attention",
        direction=direction,
        device=device,
        size=todo.size,
        x=longest,
        axis="tokens in a document",
        work=todo.useful,
        unit=todo.unit,
        ceiling=f"GEMM of {GEMM[device]}",
        ceiling_work=2 * GEMM[device] ** 3,
        set_up=lambda: attention(shape, device, ours),
        input_bytes=2 * tokens * (shape.heads + shape.kv_heads) * shape.head_dim * 2,
        on_curve=shape.on_curve,
        judged=longest >= (8192 if device == "cuda" else 512) and not SMOKE,
    )
    compare(benchmark, capsys, case, ours)


PAGE = 256  # what every peer takes
# (query heads, key heads, head dim), and for each number of sequences the lengths of contexts. The
# first of them is a figure's curve. All 256 of the longest would leave peers no room on 80 GB.
DECODE: dict[str, tuple[tuple[int, int, int], dict[int, tuple[int, ...]]]] = {
    "cpu": ((32, 8, 128), {8: (512, 2048, 8192)}),
    "cuda": ((32, 8, 128), {64: (1024, 4096, 16384), 1: (1024, 4096, 16384), 256: (4096,)}),
}
if SMOKE:
    DECODE = {device: ((4, 2, 64), {2: (300,), 1: (40,)}) for device in DEVICES}


def eager_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Hkv, group, D], dense caches [B, Hkv, L, D]."""
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
    return scores.softmax(-1).to(q.dtype) @ v


def decode(
    rows: int, context: int, shape: tuple[int, int, int], device: str, ours: list[str]
) -> SetUp:
    heads, kv_heads, dim = shape
    each = -(-context // PAGE)
    q = torch.randn(rows, heads, dim, device=device).bfloat16()
    caches = torch.randn(2, rows * each, PAGE, kv_heads, dim, device=device).bfloat16()
    k, v = caches.unbind()
    table = torch.randperm(rows * each, device=device).view(rows, each).int()
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    contenders = {
        name: Contender(
            on(name, lambda q, k, v: ops.decode_attention(q, k, v, table, lengths)), (q, k, v)
        )
        for name in ours
    }
    dense = tuple(
        x[table.long()].flatten(1, 2)[:, :context].transpose(1, 2).contiguous() for x in (k, v)
    )
    by_group = q.unflatten(1, (kv_heads, heads // kv_heads))
    for name, function in (("eager", eager_decode), ("inductor", inductor(eager_decode))):
        contenders[name] = Contender(function, (by_group, *dense))
    contenders["sdpa"] = Contender(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        (q[:, :, None], *dense),
    )
    for name, function in peers.functions("decode_attention", device).items():
        contenders[name] = Contender(
            lambda q, k, v, f=function: f(q, k, v, table, lengths), (q, k, v)
        )
    return SetUp(dense[0].clone, contenders)


@pytest.mark.parametrize(
    ("device", "rows", "context"),
    [
        (d, rows, context)
        for d in DEVICES
        for rows, many in DECODE[d][1].items()
        for context in many
    ],
)
def test_decode_attention(benchmark, capsys, device, rows, context):
    ours = ours_for("decode_attention", device)
    shape, batches = DECODE[device]
    todo = work.decode_attention(rows, context, *shape)
    case = Case(
        op="decode_attention",
        direction="forward",
        device=device,
        size=todo.size,
        x=context,
        axis="tokens in the cache of a sequence",
        work=todo.useful,
        unit=todo.unit,
        ceiling="clone",
        ceiling_work=todo.bytes,  # of the keys: read once and written once
        set_up=lambda: decode(rows, context, shape, device, ours),
        input_bytes=todo.bytes,
        on_curve=rows == next(iter(batches)),
        judged=context == batches[rows][-1] and not SMOKE,
    )
    compare(benchmark, capsys, case, ours)
