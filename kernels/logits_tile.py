"""Tiles of logits, hidden weight^T, made inside a kernel: shared by both ways of token_logprob.

A kernel that makes logits walks over tiles of rows (tokens) and columns (vocabulary), and ends each
in registers with an epilogue of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llama2rt.kernels import architecture, last_contiguous, launch_options, multiprocessors
from llama2rt.kernels.aot import Case


@triton.jit
def walk(tiles, PERSISTENT: tl.constexpr):
    """(end, step) of a program's tiles, the first of which has its own number.

    Bounds that differ by 1 tell the compiler that there is no loop. Before a loop it would compute
    addresses of the epilogue, and during the product spill them (Triton 3.9, with entropy).
    """
    if PERSISTENT:
        return tiles, tl.num_programs(0)
    else:
        return tl.program_id(0) + 1, 1


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of the tile-th tile.

    GROUP row tiles go through the columns together: tiles in flight at one time form a block, not a
    strip, and share what they read through the L2 cache.
    """
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def logits_tile(
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
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TMA:
        for start in range(0, depth, DEPTH):
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start])
            acc = tl.dot(a, b.T, acc)
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
            acc = tl.dot(a, b, acc, input_precision="ieee")
            at_a += DEPTH
            at_b += DEPTH
    return acc


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


# fp32 to the last bit has no tensor cores, and rows not aligned to 16 bytes are loaded element
# by element: a tile that leaves registers for it.
SMALL = Launch(64, 64, 32, warps=4, stages=2, group=16)


def launch_for(table: dict[int, Launch], hidden: Tensor, weight: Tensor) -> Launch:
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in (hidden, weight)
    )
    if hidden.dtype == torch.float32 or not aligned:
        return SMALL
    return table[architecture(hidden)]


def logits_operands(launch: Launch, hidden: Tensor, weight: Tensor) -> tuple:
    """The four leading arguments of a kernel that makes logits."""
    a: Tensor | TensorDescriptor = hidden
    b: Tensor | TensorDescriptor = weight
    if launch.tma:
        a = TensorDescriptor.from_tensor(hidden, [launch.rows, launch.depth])
        b = TensorDescriptor.from_tensor(weight, [launch.columns, launch.depth])
    return a, hidden.stride(0), b, weight.stride(0)


def tile_constants(launch: Launch) -> dict[str, Any]:
    """What a kernel that makes logits is compiled for."""
    return {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
        "GROUP": launch.group,
        "TMA": launch.tma,
        "PERSISTENT": launch.persistent,
    }


def logits_programs(launch: Launch, hidden: Tensor, columns: int) -> tuple[int, dict]:
    """(programs, compile-time arguments and options) of a kernel that makes logits."""
    programs = triton.cdiv(hidden.shape[0], launch.rows) * triton.cdiv(columns, launch.columns)
    if launch.persistent:
        programs = min(programs, multiprocessors(hidden))
    return programs, tile_constants(launch) | launch_options(launch.warps, launch.stages)


def dense(x: Tensor) -> Tensor:
    """x itself, or a copy where its last dimension is not contiguous or its rows overlap."""
    x = last_contiguous(x)
    return x if x.stride(0) >= x.shape[1] else x.contiguous()


def cases(
    kernel: Any,
    table: dict[int, Launch],
    optional: tuple[str, ...],
    own: Callable[[str], dict[str, str]],
) -> Iterator[Case]:
    """Of a kernel that makes logits: the hidden sizes of the 7B model and of a small one, bf16 and
    fp32, with and without entropy (whose arguments are `optional`). D 4100: rows that do not begin
    on 16 bytes. own(dtype): types of the arguments that only this kernel has."""
    for arch in (80, 90):
        for entropy in (False, True):
            for dtype, depth in (("bf16", 4096), ("bf16", 512), ("bf16", 4100), ("fp32", 4096)):
                launch = SMALL if dtype == "fp32" or depth % 8 else table[arch]
                size = "i32:16" if depth % 16 == 0 else "i32"
                types = {"hidden_stride": size, "weight_stride": size, "depth": size}
                for operand, tile in (("hidden", launch.rows), ("weight", launch.columns)):
                    block = f"tensordesc<{dtype}[{tile}, {launch.depth}]>"
                    types[operand] = block if launch.tma else f"*{dtype}:16"
                types |= {"inverse_temperature": "fp32", "rows": "i32", "columns": "i32"}
                yield Case(
                    f"{kernel.__name__.removesuffix('_kernel')} {dtype} depth {depth}"
                    + (" entropy" if entropy else ""),
                    kernel,
                    types | own(dtype) | (dict.fromkeys(optional, "*fp32:16") if entropy else {}),
                    tile_constants(launch) | ({} if entropy else dict.fromkeys(optional)),
                    launch.warps,
                    launch.stages,
                    (arch,),
                )
