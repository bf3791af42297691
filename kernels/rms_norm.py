"""RMSNorm, alone or of a residual sum, and its gradient (Zhang and Sennrich 2019).

    rstd = 1 / sqrt(mean(x^2) + eps);  y = x rstd weight
    dx = rstd (g - xhat mean(g xhat)) + dsummed,  with g = dy weight and xhat = x rstd
    dweight = sum over rows of dy xhat

Bound by memory, so what counts is that each operand is read once: a tile of whole rows stays in
registers between the sum and its use, the residual is added on the way in, and its gradient on the
way out. Rows too long for that are read twice, the second time mostly from the L2 cache.

The weight gradient has two stages: a few persistent programs walk over the rows, each keeping its
sum in registers, then a second kernel adds their fp32 sums in a fixed order. Equal inputs give
equal bits on one model of GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import (
    architecture,
    empty_like,
    last_contiguous,
    launch_options,
    multiprocessors,
)
from llama2rt.kernels.aot import Case


@triton.jit
def _load(x, residual, at_x, at_residual, mask):
    """x, or x + residual as rounded to the dtype of both, in fp32."""
    value = tl.load(x + at_x, mask, other=0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at_residual, mask, other=0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    eps,
    y,
    summed,
    rstd,
    rows,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK >= columns
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    at_x, at_y = row * x_stride, row * columns
    at_residual = at_x if residual is None else row * residual_stride
    column = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        mask = inside & (column < columns)
        value = _load(x, residual, at_x[:, None] + column, at_residual[:, None] + column, mask)
        scale = tl.load(weight + column, column < columns, other=0).to(tl.float32)
        squares = tl.sum(value * value, 1)
        r = tl.rsqrt(squares / columns + eps)
        if residual is not None:
            tl.store(summed + at_y[:, None] + column, value.to(summed.dtype.element_ty), mask)
        normed = value * r[:, None] * scale
        tl.store(y + at_y[:, None] + column, normed.to(y.dtype.element_ty), mask)
    else:
        partial = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            c = start + column
            mask = inside & (c < columns)
            value = _load(x, residual, at_x[:, None] + c, at_residual[:, None] + c, mask)
            partial += value * value
        r = tl.rsqrt(tl.sum(partial, 1) / columns + eps)
        for start in range(0, columns, BLOCK):
            c = start + column
            mask = inside & (c < columns)
            value = _load(x, residual, at_x[:, None] + c, at_residual[:, None] + c, mask)
            scale = tl.load(weight + c, c < columns, other=0).to(tl.float32)
            if residual is not None:
                tl.store(summed + at_y[:, None] + c, value.to(summed.dtype.element_ty), mask)
            tl.store(
                y + at_y[:, None] + c, (value * r[:, None] * scale).to(y.dtype.element_ty), mask
            )
    tl.store(rstd + row, r, row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy,
    dy_stride,
    dsummed,
    dsummed_stride,
    x,
    x_stride,
    weight,
    rstd,
    dx,
    partial,  # fp32 [programs, columns]: each program's sum for dweight
    rows,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    there = column < columns
    scale = tl.load(weight + column, there, other=0).to(tl.float32)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    # Stages: the rows of the next turn are on their way while this one's are reduced.
    for start in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = row < rows
        mask = inside[:, None] & there
        g = tl.load(dy + (row * dy_stride)[:, None] + column, mask, other=0).to(tl.float32)
        r = tl.load(rstd + row, inside, other=0)[:, None]
        xhat = tl.load(x + (row * x_stride)[:, None] + column, mask, other=0).to(tl.float32) * r
        acc += g * xhat
        g *= scale
        result = r * (g - xhat * (tl.sum(g * xhat, 1) / columns)[:, None])
        if dsummed is not None:
            at = (row * dsummed_stride)[:, None] + column
            result += tl.load(dsummed + at, mask, other=0).to(tl.float32)
        tl.store(dx + (row * columns)[:, None] + column, result.to(dx.dtype.element_ty), mask)
    tl.store(partial + program * columns + column, tl.sum(acc, 0)[None, :], there)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_long_kernel(
    dy,
    dy_stride,
    dsummed,
    dsummed_stride,
    x,
    x_stride,
    weight,
    rstd,
    dx,
    partial,
    rows,
    columns,
    BLOCK: tl.constexpr,
):
    """The same for rows longer than BLOCK: sums for dweight live in `partial`, not in registers."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mine = partial + program * columns
    for start in range(0, columns, BLOCK):
        c = start + column
        tl.store(mine + c, tl.zeros((BLOCK,), tl.float32), c < columns)
    for turn in range(program, rows, tl.num_programs(0)):
        row = tl.cast(turn, tl.int64)
        r = tl.load(rstd + row)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            c = start + column
            there = c < columns
            g = tl.load(dy + row * dy_stride + c, there, other=0).to(tl.float32)
            value = tl.load(x + row * x_stride + c, there, other=0).to(tl.float32)
            products += g * value * tl.load(weight + c, there, other=0).to(tl.float32)
        projection = tl.sum(products) * r / columns
        # The sums of the row before were stored by threads that need not be those that load them.
        tl.debug_barrier()
        for start in range(0, columns, BLOCK):
            c = start + column
            there = c < columns
            g = tl.load(dy + row * dy_stride + c, there, other=0).to(tl.float32)
            xhat = tl.load(x + row * x_stride + c, there, other=0).to(tl.float32) * r
            scale = tl.load(weight + c, there, other=0).to(tl.float32)
            result = r * (g * scale - xhat * projection)
            if dsummed is not None:
                result += tl.load(dsummed + row * dsummed_stride + c, there, other=0).to(tl.float32)
            tl.store(dx + row * columns + c, result.to(dx.dtype.element_ty), there)
            tl.store(mine + c, tl.load(mine + c, there, other=0) + g * xhat, there)


@triton.jit(do_not_specialize=["programs"])
def rms_norm_dweight_kernel(
    partial, dweight, programs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (column < columns)
        at = row.to(tl.int64)[:, None] * columns + column
        acc += tl.load(partial + at, mask, other=0)
    tl.store(dweight + column, tl.sum(acc, 0).to(dweight.dtype.element_ty), column < columns)


@dataclass(frozen=True)
class Launch:
    """Sizes are bytes of one operand, so that settings hold for every dtype."""

    tile: int
    """Of a program at least: short rows share a program."""
    per_thread: int
    longest: int
    """Row that is held in registers; a longer one is read twice."""
    stages: int = 1
    """Turns of the loop over rows that are in flight."""
    warps: int = 0
    """Persistent ones on a multiprocessor."""

    def shape(self, columns: int, element_bytes: int) -> tuple[int, int, int]:
        """(rows, columns, warps) of a program's tile for rows of `columns` elements."""
        longest = self.longest // element_bytes
        block = triton.next_power_of_2(max(1, min(columns, longest)))
        rows = max(1, self.tile // (block * element_bytes))
        warps = rows * block * element_bytes // (32 * self.per_thread)
        return rows, block, max(1, warps)


# Forward: four loads of 16 bytes a thread. The longest row takes 16 warps of 128 registers, all
# that a multiprocessor has.
FORWARD = {arch: Launch(tile=8192, per_thread=64, longest=32768) for arch in (80, 90)}
# Backward: two operands, and in fp32 their sum for dweight, want half as much of each in a thread.
# With 128 registers a thread a multiprocessor has room for 16 warps, and two stages keep the 32
# bytes a thread of dy and of x on their way throughout: 32 KiB on each multiprocessor, while 4.8
# TB/s over 132 of them need 19 KiB for reads that take 800 ns (two thirds of the traffic).
BACKWARD = {
    arch: Launch(tile=4096, per_thread=32, longest=16384, stages=2, warps=16) for arch in (80, 90)
}
# Columns of 128 bytes of fp32: many programs, each with short loops over the partial sums.
DWEIGHT_ROWS, DWEIGHT_COLUMNS, DWEIGHT_WARPS = 64, 32, 4


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, weight = last_contiguous(x), weight.contiguous()
    rows, columns = x.shape
    y, rstd = empty_like(x), x.new_empty(rows, dtype=torch.float32)
    summed = None
    if residual is not None:
        residual, summed = last_contiguous(residual), empty_like(x)
    if rows == 0:
        return y, summed, rstd
    tile, block, warps = FORWARD[architecture(x)].shape(columns, x.element_size())
    with torch.cuda.device_of(x):
        rms_norm_kernel[(triton.cdiv(rows, tile),)](
            x,
            x.stride(0),
            residual,
            None if residual is None else residual.stride(0),
            weight,
            eps,
            y,
            summed,
            rstd,
            rows,
            columns,
            ROWS=tile,
            BLOCK=block,
            WHOLE=columns <= block,
            **launch_options(warps),
        )
    return y, summed, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], weight [N] -> (y, rstd [T] fp32)."""
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [T, N], weight [N] -> (y, x + residual, rstd [T] fp32)."""
    y, summed, rstd = _forward(x, residual, weight, eps)
    assert summed is not None
    return y, summed, rstd


def add_rms_norm_backward(
    dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, equal to that of residual; gradient of weight)."""
    dy, x = last_contiguous(dy), last_contiguous(summed)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    if dsummed is not None:
        dsummed = last_contiguous(dsummed)
    rows, columns = x.shape
    if x.numel() == 0:
        return empty_like(x), torch.zeros_like(weight)
    dx, dweight = empty_like(x), empty_like(weight)
    launch = BACKWARD[architecture(x)]
    tile, block, warps = launch.shape(columns, x.element_size())
    programs = min(triton.cdiv(rows, tile), launch.warps // warps * multiprocessors(x))
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    arguments = (
        dy,
        dy.stride(0),
        dsummed,
        None if dsummed is None else dsummed.stride(0),
        x,
        x.stride(0),
        weight,
        rstd,
        dx,
        partial,
        rows,
        columns,
    )
    with torch.cuda.device_of(x):
        if columns <= block:
            rms_norm_backward_kernel[(programs,)](
                *arguments,
                ROWS=tile,
                BLOCK=block,
                STAGES=launch.stages,
                **launch_options(warps),
            )
        else:
            rms_norm_backward_long_kernel[(programs,)](
                *arguments, BLOCK=block, **launch_options(warps)
            )
        rms_norm_dweight_kernel[(triton.cdiv(columns, DWEIGHT_COLUMNS),)](
            partial,
            dweight,
            programs,
            columns,
            ROWS=DWEIGHT_ROWS,
            BLOCK=DWEIGHT_COLUMNS,
            **launch_options(DWEIGHT_WARPS),
        )
    return dx, dweight


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight)."""
    return add_rms_norm_backward(dy, None, x, weight, rstd)


def aot_cases() -> Iterator[Case]:
    """Rows of a small model, of 7B and 70B, and too long to hold; with and without a residual."""
    for dtype, element_bytes, columns, add in (
        ("bf16", 2, 288, False),
        ("bf16", 2, 4096, False),
        ("bf16", 2, 4096, True),
        ("bf16", 2, 8192, True),
        ("bf16", 2, 32768, True),
        ("fp32", 4, 4096, True),
    ):
        pointer, number = f"*{dtype}:16", "i32:16"
        name = f"{dtype} columns {columns}{' with residual' * add}"
        common = {"x": pointer, "x_stride": number, "weight": pointer, "rstd": "*fp32:16"}
        common |= {"rows": "i32", "columns": number}
        tile, block, warps = FORWARD[80].shape(columns, element_bytes)
        sizes = {"ROWS": tile, "BLOCK": block, "WHOLE": columns <= block}
        extra = {"residual": pointer, "residual_stride": number, "summed": pointer}
        yield Case(
            f"rms_norm {name}",
            rms_norm_kernel,
            common | {"y": pointer, "eps": "fp32"} | (extra if add else {}),
            sizes | ({} if add else dict.fromkeys(extra)),
            warps,
        )
        launch = BACKWARD[80]
        tile, block, warps = launch.shape(columns, element_bytes)
        whole = columns <= block
        extra = {"dsummed": pointer, "dsummed_stride": number}
        yield Case(
            f"rms_norm_backward {name}",
            rms_norm_backward_kernel if whole else rms_norm_backward_long_kernel,
            common
            | {"dy": pointer, "dy_stride": number, "dx": pointer, "partial": "*fp32:16"}
            | (extra if add else {}),
            {"BLOCK": block}
            | ({"ROWS": tile, "STAGES": launch.stages} if whole else {})
            | ({} if add else dict.fromkeys(extra)),
            warps,
        )
    yield Case(
        "rms_norm_dweight bf16",
        rms_norm_dweight_kernel,
        {"partial": "*fp32:16", "dweight": "*bf16:16", "programs": "i32", "columns": "i32:16"},
        {"ROWS": DWEIGHT_ROWS, "BLOCK": DWEIGHT_COLUMNS},
        DWEIGHT_WARPS,
    )
