"""Log-probability of each token's target, and its gradient, without the [T, V] logits.

    logits = hidden weight^T / temperature;  lse = log sum exp logits;  p = exp(logits - lse)
    logprob = logits[target] - lse;  entropy = -sum p log p
    dlogits = (dlogprob (onehot - p) - dentropy p (log p + entropy)) / temperature
    dhidden = dlogits weight;  dweight = dlogits^T hidden

Forward is one matrix product whose tiles end in registers as a record per row: the largest logit
of the tile, the sum of exponentials relative to it, and for the entropy their mean. A small second
kernel merges a row's records in a fixed order. The alternative, cuBLAS into a buffer and a softmax
pass over it, must write and read fp32 logits: a pass of 4 bytes a logit, 0.93 ps on an H200 (4.3
TB/s), on top of 2 D / 790 TFLOP/s. By this arithmetic it breaks even with a fused product
running at 459 TFLOP/s for D 512, 668 for D 2048 and 725 for D 4096; fused needs no buffer. None of
it has been timed yet.

Backward recomputes the logits one slice of the vocabulary at a time, tile by tile as forward did,
with dlogits as epilogue, rounded to hidden's dtype in a buffer of at most 1/8 of the logits. The
two products that remain have no epilogue and are cuBLAS's. Of the 8 T D V operations executed
6 T D V are useful.

All sums are fp32 and in a fixed order: equal inputs give equal bits on one model of GPU. A target
>= V, which cannot be seen without waiting for the device, gives a log-probability of NaN.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llama2rt.kernels import (
    architecture,
    empty_like,
    last_contiguous,
    launch_options,
    multiprocessors,
)
from llama2rt.kernels.aot import Case

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# A logit whose exponential is 0 beside any other; unlike -inf, 0 times it is 0.
NOTHING = tl.constexpr(-1e20)


@triton.jit
def _walk(tiles, PERSISTENT: tl.constexpr):
    """(end, step) of a program's tiles, the first of which has its own number.

    Bounds that differ by 1 tell the compiler that there is no loop. Before a loop it would compute
    addresses of the epilogue, and during the product spill them (Triton 3.9, with entropy).
    """
    if PERSISTENT:
        return tiles, tl.num_programs(0)
    else:
        return tl.program_id(0) + 1, 1


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of the tile-th tile.

    GROUP row tiles go through the columns together: tiles in flight at one time form a block, not a
    strip, and share what they read through the L2 cache.
    """
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def _logits(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    first_row,
    first_column,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile of hidden weight^T in fp32; outside the true sizes it holds finite values of no use."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TMA:
        for start in range(0, depth, DEPTH):
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start])
            total = tl.dot(a, b.T, total)
    else:
        # The last row again, rather than a mask, for rows outside.
        row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        column = tl.minimum(first_column + tl.arange(0, COLUMNS), columns - 1).to(tl.int64)
        k = tl.arange(0, DEPTH)
        at_a = hidden + (row * hidden_stride)[:, None] + k[None, :]
        at_b = weight + (column * weight_stride)[None, :] + k[:, None]
        for start in range(0, depth, DEPTH):
            inside = k < depth - start
            a = tl.load(at_a, inside[None, :], other=0)
            b = tl.load(at_b, inside[:, None], other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
            at_a += DEPTH
            at_b += DEPTH
    return total


@triton.jit(do_not_specialize=["rows", "columns"])
def token_logprob_kernel(
    hidden,  # [rows, depth], as descriptor where TMA
    hidden_stride,
    weight,  # [columns, depth], likewise
    weight_stride,
    inverse_temperature,
    peak,  # fp32 [column tiles, rows]: the records
    total,
    spread,  # None without entropy
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    end, stride = _walk(row_tiles * column_tiles, PERSISTENT)
    # Flattened, the loads of a tile's first steps are on their way during the epilogue before it.
    for tile in tl.range(tl.program_id(0), end, stride, flatten=PERSISTENT):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        x = _logits(
            hidden,
            hidden_stride,
            weight,
            weight_stride,
            row_tile * ROWS,
            column_tile * COLUMNS,
            rows,
            columns,
            depth,
            ROWS,
            COLUMNS,
            DEPTH,
            TMA,
        )
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        there = row < rows
        x = tl.where((column < columns)[None, :], x, NOTHING)
        largest = tl.max(x, 1)
        # The difference first: between the logits that count, it is exact.
        x = (x - largest[:, None]) * (inverse_temperature * LOG2_E)
        e = tl.exp2(x)
        at = column_tile.to(tl.int64) * rows + row
        tl.store(peak + at, largest, there)
        tl.store(total + at, tl.sum(e, 1), there)
        if spread is not None:
            tl.store(spread + at, tl.sum(e * x, 1), there)


@triton.jit(do_not_specialize=["rows", "columns", "tiles"])
def token_logprob_merge_kernel(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    targets,
    inverse_temperature,
    peak,
    total,
    spread,
    logprob,
    entropy,
    lse,
    rows,
    columns,
    depth,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    largest = tl.full((ROWS, TILES), float("-inf"), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = there[:, None] & (tile < tiles)[None, :]
        at = tile.to(tl.int64)[None, :] * rows + row[:, None]
        largest = tl.maximum(largest, tl.load(peak + at, mask, other=float("-inf")))
    largest = tl.where(there, tl.max(largest, 1), 0)
    sums = tl.zeros((ROWS, TILES), tl.float32)
    means = tl.zeros((ROWS, TILES), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = there[:, None] & (tile < tiles)[None, :]
        at = tile.to(tl.int64)[None, :] * rows + row[:, None]
        below = tl.load(peak + at, mask, other=0) - largest[:, None]
        below *= inverse_temperature * LOG2_E
        factor = tl.exp2(below)
        s = tl.load(total + at, mask, other=0)
        sums += s * factor
        if spread is not None:
            u = tl.load(spread + at, mask, other=0)
            means += factor * (u + s * below)
    s = tl.where(there, tl.sum(sums, 1), 1)
    log_s = tl.log2(s)
    tl.store(lse + row, largest * inverse_temperature + log_s * LN_2, there)

    target = tl.load(targets + row, there, other=-1).to(tl.int64)
    predicted = (target >= 0) & (target < columns)
    k = tl.arange(0, DEPTH)
    at_a = hidden + (row.to(tl.int64) * hidden_stride)[:, None] + k[None, :]
    at_b = weight + (target * weight_stride)[:, None] + k[None, :]
    products = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, depth, DEPTH):
        mask = predicted[:, None] & (k < depth - start)[None, :]
        a = tl.load(at_a, mask, other=0).to(tl.float32)
        products += a * tl.load(at_b, mask, other=0).to(tl.float32)
        at_a += DEPTH
        at_b += DEPTH
    value = (tl.sum(products, 1) - largest) * inverse_temperature - log_s * LN_2
    # A sum in another order than the tile's: what comes out above 0 is rounding.
    value = tl.where(value > 0, 0, value)
    value = tl.where(target < columns, value, float("nan"))
    tl.store(logprob + row, tl.where(target < 0, 0, value), there)
    if spread is not None:
        # Relative to the largest logit both terms are >= 0: nothing cancels.
        value = (log_s - tl.sum(means, 1) / s) * LN_2
        tl.store(entropy + row, tl.where(target < 0, 0, value), there)


@triton.jit(do_not_specialize=["rows", "columns", "first"])
def token_logprob_dlogits_kernel(
    hidden,
    hidden_stride,
    weight,  # the slice of the vocabulary: rows `first` to `first + columns`
    weight_stride,
    targets,
    dlogprob,
    dentropy,  # None without entropy, as is entropy
    lse,
    entropy,
    inverse_temperature,
    dlogits,
    dlogits_stride,
    first,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    end, stride = _walk(row_tiles * column_tiles, PERSISTENT)
    for tile in tl.range(tl.program_id(0), end, stride, flatten=PERSISTENT):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        x = _logits(
            hidden,
            hidden_stride,
            weight,
            weight_stride,
            row_tile * ROWS,
            column_tile * COLUMNS,
            rows,
            columns,
            depth,
            ROWS,
            COLUMNS,
            DEPTH,
            TMA,
        )
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        there = row < rows
        target = tl.load(targets + row, there, other=-1)
        predicted = target >= 0
        g = tl.load(dlogprob + row, there, other=0) * inverse_temperature
        g = tl.where(predicted, g, 0)
        log_p = x * inverse_temperature - tl.load(lse + row, there, other=0)[:, None]
        p = tl.exp2(log_p * LOG2_E)
        hit = column[None, :] == (target - first)[:, None]
        if dentropy is not None:
            h = tl.load(dentropy + row, there, other=0) * inverse_temperature
            h = tl.where(predicted, h, 0)
            # g + h (log p + entropy), as one multiplication and addition an element
            level = g + h * tl.load(entropy + row, there, other=0)
            d = tl.where(hit, g[:, None], 0) - p * (log_p * h[:, None] + level[:, None])
        else:
            d = (tl.where(hit, 1.0, 0.0) - p) * g[:, None]
        at = row.to(tl.int64)[:, None] * dlogits_stride + column[None, :]
        mask = there[:, None] & (column < columns)[None, :]
        tl.store(dlogits + at, d.to(dlogits.dtype.element_ty), mask)


@dataclass(frozen=True)
class Launch:
    rows: int
    """Tile of logits: rows (tokens), columns (vocabulary), and how deep one step of it goes."""
    columns: int
    depth: int
    warps: int
    stages: int
    """Steps whose operands are in shared memory at one time."""
    group: int
    """Row tiles that go through the vocabulary together."""
    persistent: bool = False
    """One program a multiprocessor, walking over the tiles; else one program a tile."""
    tma: bool = False
    """Operands by descriptor."""


# 128 x 256 x 64, the largest tile whose fp32 sum fits the registers of 8 warps (128 a thread): it
# reads 48 KiB per 4.2 MFLOP, a third less than 128 x 128, and L2 bandwidth is what limits a product
# without multicast. One block fits a multiprocessor; on sm_90 a persistent one with TMA hides the
# start of a tile behind the end of the last. group: tiles in flight touch group * 128 rows of
# hidden and tiles / group * 256 of weight, the least of both at sqrt(2 tiles): 16 of 132.
FORWARD = {
    80: Launch(128, 256, 64, warps=8, stages=3, group=16),
    90: Launch(128, 256, 64, warps=8, stages=4, group=16, persistent=True, tma=True),
}
# As forward, with a stage less: the tile of dlogits passes through shared memory to be stored.
BACKWARD = {
    80: Launch(128, 256, 64, warps=8, stages=3, group=16),
    90: Launch(128, 256, 64, warps=8, stages=3, group=16, persistent=True, tma=True),
}
# fp32 to the last bit has no tensor cores, and rows not aligned to 16 bytes are loaded element
# by element: a tile that leaves registers for it.
SMALL = Launch(64, 64, 32, warps=4, stages=2, group=16)
# Eight rows: 32 bytes, a sector, of each record; and 16 elements a thread of each operand of the
# chosen logit on their way at one time (with 32, sm_90 spills).
MERGE_ROWS, MERGE_TILES, MERGE_DEPTH, MERGE_WARPS = 8, 32, 256, 4

# Columns of dlogits at one time, at least: below that the products with them are too small for the
# GPU, and what is saved is less than dweight's own size.
SLICE = 2048
# Elements of dweight in fp32 at one time: 32 MiB stay in the L2 cache until they are rounded, and
# are 256 tiles of 128 x 256, a whole number of rounds over 132 multiprocessors but for 3 %.
PART = 1 << 23


def _launch(table: dict[int, Launch], hidden: Tensor, weight: Tensor) -> Launch:
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in (hidden, weight)
    )
    if hidden.dtype == torch.float32 or not aligned:
        return SMALL
    return table[architecture(hidden)]


def _operands(launch: Launch, hidden: Tensor, weight: Tensor) -> tuple:
    """The four leading arguments of a kernel that makes logits."""
    a: Tensor | TensorDescriptor = hidden
    b: Tensor | TensorDescriptor = weight
    if launch.tma:
        a = TensorDescriptor.from_tensor(hidden, [launch.rows, launch.depth])
        b = TensorDescriptor.from_tensor(weight, [launch.columns, launch.depth])
    return a, hidden.stride(0), b, weight.stride(0)


def _tiles(launch: Launch, hidden: Tensor, columns: int) -> tuple[int, dict]:
    """(programs, compile-time arguments and options) of a kernel that makes logits."""
    programs = triton.cdiv(hidden.shape[0], launch.rows) * triton.cdiv(columns, launch.columns)
    if launch.persistent:
        programs = min(programs, multiprocessors(hidden))
    return programs, {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
        "GROUP": launch.group,
        "TMA": launch.tma,
        "PERSISTENT": launch.persistent,
        **launch_options(launch.warps, launch.stages),
    }


def _dense(x: Tensor) -> Tensor:
    """x itself, or a copy where its last dimension is not contiguous or its rows overlap."""
    x = last_contiguous(x)
    return x if x.stride(0) >= x.shape[1] else x.contiguous()


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], targets [T] -> (logprob, entropy or empty, lse), fp32 [T].

    Extra memory: 8 bytes (12 with entropy) per token and 256 columns of the vocabulary.
    """
    hidden, weight, targets = _dense(hidden), _dense(weight), targets.contiguous()
    rows, columns = hidden.shape[0], weight.shape[0]
    logprob, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    uncertainty = hidden.new_empty(rows if entropy else 0, dtype=torch.float32)
    if rows == 0:
        return logprob, uncertainty, lse
    launch = _launch(FORWARD, hidden, weight)
    tiles = triton.cdiv(columns, launch.columns)
    records = hidden.new_empty(3 if entropy else 2, tiles, rows, dtype=torch.float32)
    peak, total, spread = records if entropy else (*records, None)
    programs, options = _tiles(launch, hidden, columns)
    with torch.cuda.device_of(hidden):
        token_logprob_kernel[(programs,)](
            *_operands(launch, hidden, weight),
            1 / temperature,
            peak,
            total,
            spread,
            rows,
            columns,
            hidden.shape[1],
            **options,
        )
        token_logprob_merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            targets,
            1 / temperature,
            peak,
            total,
            spread,
            logprob,
            uncertainty,
            lse,
            rows,
            columns,
            hidden.shape[1],
            tiles,
            ROWS=MERGE_ROWS,
            TILES=MERGE_TILES,
            DEPTH=MERGE_DEPTH,
            **launch_options(MERGE_WARPS),
        )
    return logprob, uncertainty, lse


def _product(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta out + a b, summed in fp32 to the end: `out` is fp32, a and b of one dtype."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:  # the interpreter: torch has this product for GPUs only
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


def token_logprob_backward(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight).

    Extra memory: dlogits for 1/8 of the vocabulary (or `SLICE`) in hidden's dtype; unless that is
    fp32, also dhidden and 32 MiB of dweight in fp32.
    """
    hidden, weight, targets = _dense(hidden), _dense(weight), targets.contiguous()
    dlogprob, lse = dlogprob.contiguous(), lse.contiguous()
    if dentropy is not None and entropy is not None:
        dentropy, entropy = dentropy.contiguous(), entropy.contiguous()
    rows, depth = hidden.shape
    vocabulary = weight.shape[0]
    if hidden.numel() == 0:
        return empty_like(hidden), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dweight = empty_like(weight)
    dhidden = torch.empty((rows, depth), dtype=torch.float32, device=hidden.device)
    launch = _launch(BACKWARD, hidden, weight)
    columns = min(max(vocabulary // 8, SLICE), vocabulary)
    width = triton.cdiv(columns, 16) * 16  # rows of dlogits that begin on 32 bytes
    dlogits = hidden.new_empty(rows, width)
    part = max(PART // depth // launch.columns, 1) * launch.columns
    exact = hidden.dtype == torch.float32
    sums = None if exact else dhidden.new_empty(min(part, columns), depth)
    for first in range(0, vocabulary, columns):
        slice_ = weight[first : first + columns]
        size = slice_.shape[0]
        programs, options = _tiles(launch, hidden, size)
        with torch.cuda.device_of(hidden):
            token_logprob_dlogits_kernel[(programs,)](
                *_operands(launch, hidden, slice_),
                targets,
                dlogprob,
                dentropy,
                lse,
                entropy,
                1 / temperature,
                dlogits,
                width,
                first,
                rows,
                size,
                depth,
                **options,
            )
        _product(dhidden, dlogits[:, :size], slice_, beta=int(first > 0))
        for start in range(0, size, part):
            some = dlogits[:, start : min(start + part, size)].T
            result = dweight[first + start : first + start + some.shape[0]]
            if sums is None:
                _product(result, some, hidden, beta=0)
            else:
                _product(sums[: some.shape[0]], some, hidden, beta=0)
                result.copy_(sums[: some.shape[0]])
    return dhidden.to(hidden.dtype), dweight


def aot_cases() -> Iterator[Case]:
    """The hidden sizes of the 7B model and of a small one, bf16 and fp32, with and without entropy.

    D 4100: rows that do not begin on 16 bytes.
    """
    for arch in (80, 90):
        for entropy in (False, True):
            for dtype, depth in (("bf16", 4096), ("bf16", 512), ("bf16", 4100), ("fp32", 4096)):
                yield from _aot_cases(arch, dtype, depth, entropy)
    for entropy in (False, True):
        fp32, names = "*fp32:16", ("peak", "total", "logprob", "entropy", "lse")
        yield Case(
            "token_logprob_merge" + (" entropy" if entropy else ""),
            token_logprob_merge_kernel,
            dict.fromkeys(names, fp32)
            | {"hidden": "*bf16:16", "hidden_stride": "i32:16", "weight": "*bf16:16"}
            | {"weight_stride": "i32:16", "targets": "*i64:16", "rows": "i32"}
            | {"inverse_temperature": "fp32", "columns": "i32", "depth": "i32:16", "tiles": "i32"}
            | ({"spread": fp32} if entropy else {}),
            {"ROWS": MERGE_ROWS, "TILES": MERGE_TILES, "DEPTH": MERGE_DEPTH}
            | ({} if entropy else {"spread": None}),
            MERGE_WARPS,
        )


def _aot_cases(arch: int, dtype: str, depth: int, entropy: bool) -> Iterator[Case]:
    name = f"{dtype} depth {depth}" + (" entropy" if entropy else "")
    size, fp32 = ("i32:16" if depth % 16 == 0 else "i32"), "*fp32:16"
    common = {"inverse_temperature": "fp32", "rows": "i32", "columns": "i32", "depth": size}
    forward = dict.fromkeys(("peak", "total"), fp32)
    backward = dict.fromkeys(("dlogprob", "lse"), fp32) | {
        "targets": "*i64:16",
        "dlogits": f"*{dtype}:16",
        "dlogits_stride": "i32:16",
        "first": "i32",
    }
    for kernel, table, own, optional in (
        (token_logprob_kernel, FORWARD, forward, ("spread",)),
        (token_logprob_dlogits_kernel, BACKWARD, backward, ("dentropy", "entropy")),
    ):
        launch = SMALL if dtype == "fp32" or depth % 8 else table[arch]
        operands = {"hidden_stride": size, "weight_stride": size}
        for operand, tile in (("hidden", launch.rows), ("weight", launch.columns)):
            block = f"tensordesc<{dtype}[{tile}, {launch.depth}]>"
            operands[operand] = block if launch.tma else f"*{dtype}:16"
        yield Case(
            f"{kernel.__name__.removesuffix('_kernel')} {name}",
            kernel,
            operands | common | own | (dict.fromkeys(optional, fp32) if entropy else {}),
            {
                "ROWS": launch.rows,
                "COLUMNS": launch.columns,
                "DEPTH": launch.depth,
                "GROUP": launch.group,
                "TMA": launch.tma,
                "PERSISTENT": launch.persistent,
            }
            | ({} if entropy else dict.fromkeys(optional)),
            launch.warps,
            launch.stages,
            (arch,),
        )
