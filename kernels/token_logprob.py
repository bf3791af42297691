"""Log-probability of each token's target, without the [T, V] logits: forward.

    logits = hidden weight^T / temperature;  lse = log sum exp logits;  p = exp(logits - lse)
    logprob = logits[target] - lse;  entropy = -sum p log p

Forward is one matrix product whose tiles end in registers as a record per row: the largest logit
of the tile, the sum of exponentials relative to it, and for the entropy their mean. A small second
kernel merges a row's records in a fixed order. The alternative, cuBLAS into a buffer and a softmax
pass over it, must write and read fp32 logits: a pass of 4 bytes a logit, 0.93 ps on an H200 (4.3
TB/s), on top of 2 D / 790 TFLOP/s. By this arithmetic it breaks even with a fused product
running at 459 TFLOP/s for D 512, 668 for D 2048 and 725 for D 4096; fused needs no buffer. None of
it has been timed yet.

All sums are fp32 and in a fixed order: equal inputs give equal bits on one model of GPU. A target
>= V, which cannot be seen without waiting for the device, gives a log-probability of NaN.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import launch_options
from llama2rt.kernels.aot import Case
from llama2rt.kernels.logits_tile import (
    Launch,
    cases,
    dense,
    launch_for,
    logits_operands,
    logits_programs,
    logits_tile,
    tile_position,
    walk,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# A logit whose exponential is 0 beside any other; unlike -inf, 0 times it is 0.
NOTHING = tl.constexpr(-1e20)


@triton.jit(do_not_specialize=["rows", "columns"])
def token_logprob_kernel(
    hidden,  # [rows, depth], as descriptor where TMA
    hidden_stride,
    weight,  # [columns, depth], likewise
    weight_stride,
    inverse_temperature,
    row_max,  # fp32 [column tiles, rows]: the records
    row_sum,
    weighted_sum,  # None without entropy
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
    end, stride = walk(row_tiles * column_tiles, PERSISTENT)
    # Flattened, the loads of a tile's first steps are on their way during the epilogue before it.
    for tile in tl.range(tl.program_id(0), end, stride, flatten=PERSISTENT):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        x = logits_tile(
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
        tl.store(row_max + at, largest, there)
        tl.store(row_sum + at, tl.sum(e, 1), there)
        if weighted_sum is not None:
            tl.store(weighted_sum + at, tl.sum(e * x, 1), there)


@triton.jit(do_not_specialize=["rows", "columns", "tiles"])
def token_logprob_merge_kernel(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    targets,
    inverse_temperature,
    row_max,
    row_sum,
    weighted_sum,
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
        largest = tl.maximum(largest, tl.load(row_max + at, mask, other=float("-inf")))
    largest = tl.where(there, tl.max(largest, 1), 0)
    sums = tl.zeros((ROWS, TILES), tl.float32)
    means = tl.zeros((ROWS, TILES), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = there[:, None] & (tile < tiles)[None, :]
        at = tile.to(tl.int64)[None, :] * rows + row[:, None]
        below = tl.load(row_max + at, mask, other=0) - largest[:, None]
        below *= inverse_temperature * LOG2_E
        factor = tl.exp2(below)
        s = tl.load(row_sum + at, mask, other=0)
        sums += s * factor
        if weighted_sum is not None:
            u = tl.load(weighted_sum + at, mask, other=0)
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
    if weighted_sum is not None:
        # Relative to the largest logit both terms are >= 0: nothing cancels.
        value = (log_s - tl.sum(means, 1) / s) * LN_2
        tl.store(entropy + row, tl.where(target < 0, 0, value), there)


# 128 x 256 x 64, the largest tile whose fp32 sum fits the registers of 8 warps (128 a thread): it
# reads 48 KiB per 4.2 MFLOP, a third less than 128 x 128, and L2 bandwidth is what limits a product
# without multicast. One block fits a multiprocessor; on sm_90 a persistent one with TMA hides the
# start of a tile behind the end of the last. group: tiles in flight touch group * 128 rows of
# hidden and tiles / group * 256 of weight, the least of both at sqrt(2 tiles): 16 of 132.
FORWARD = {
    80: Launch(128, 256, 64, warps=8, stages=3, group=16),
    90: Launch(128, 256, 64, warps=8, stages=4, group=16, persistent=True, tma=True),
}
# Eight rows: 32 bytes, a sector, of each record; and 16 elements a thread of each operand of the
# chosen logit on their way at one time (with 32, sm_90 spills).
MERGE_ROWS, MERGE_TILES, MERGE_DEPTH, MERGE_WARPS = 8, 32, 256, 4


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], targets [T] -> (logprob, entropy or empty, lse), fp32 [T].

    Extra memory: 8 bytes (12 with entropy) per token and 256 columns of the vocabulary.
    """
    hidden, weight, targets = dense(hidden), dense(weight), targets.contiguous()
    rows, columns = hidden.shape[0], weight.shape[0]
    logprob, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    entropies = hidden.new_empty(rows if entropy else 0, dtype=torch.float32)
    if rows == 0:
        return logprob, entropies, lse
    launch = launch_for(FORWARD, hidden, weight)
    tiles = triton.cdiv(columns, launch.columns)
    records = hidden.new_empty(3 if entropy else 2, tiles, rows, dtype=torch.float32)
    row_max, row_sum, weighted_sum = records if entropy else (*records, None)
    programs, options = logits_programs(launch, hidden, columns)
    with torch.cuda.device_of(hidden):
        token_logprob_kernel[(programs,)](
            *logits_operands(launch, hidden, weight),
            1 / temperature,
            row_max,
            row_sum,
            weighted_sum,
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
            row_max,
            row_sum,
            weighted_sum,
            logprob,
            entropies,
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
    return logprob, entropies, lse


def aot_cases() -> Iterator[Case]:
    optional, statistics = ("weighted_sum",), dict.fromkeys(("row_max", "row_sum"), "*fp32:16")
    yield from cases(token_logprob_kernel, FORWARD, optional, lambda dtype: statistics)
    for entropy in (False, True):
        fp32, names = "*fp32:16", ("row_max", "row_sum", "logprob", "entropy", "lse")
        yield Case(
            "token_logprob_merge" + (" entropy" if entropy else ""),
            token_logprob_merge_kernel,
            dict.fromkeys(names, fp32)
            | {"hidden": "*bf16:16", "hidden_stride": "i32:16", "weight": "*bf16:16"}
            | {"weight_stride": "i32:16", "targets": "*i64:16", "rows": "i32"}
            | {"inverse_temperature": "fp32", "columns": "i32", "depth": "i32:16", "tiles": "i32"}
            | ({"weighted_sum": fp32} if entropy else {}),
            {"ROWS": MERGE_ROWS, "TILES": MERGE_TILES, "DEPTH": MERGE_DEPTH}
            | ({} if entropy else {"weighted_sum": None}),
            MERGE_WARPS,
        )
