"""The gradient of token_logprob, without the [T, V] logits.

    logits = hidden weight^T / temperature;  p = exp(logits - lse)
    dlogits = (dlogprob (onehot - p) - dentropy p (log p + entropy)) / temperature
    dhidden = dlogits weight;  dweight = dlogits^T hidden

Backward recomputes the logits one slice of the vocabulary at a time, tile by tile as forward did,
with dlogits as epilogue, rounded to hidden's dtype in a buffer of at most 1/8 of the logits. The
two products that remain have no epilogue and are cuBLAS's. Of the 8 T D V operations executed
6 T D V are useful.

All sums are fp32 and in a fixed order: equal inputs give equal bits on one model of GPU.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import empty_like
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
from llama2rt.kernels.token_logprob import LOG2_E


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
    end, stride = walk(row_tiles * column_tiles, PERSISTENT)
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


# As `token_logprob.FORWARD`, with a stage less: the tile of dlogits passes through shared memory to
# be stored.
BACKWARD = {
    80: Launch(128, 256, 64, warps=8, stages=3, group=16),
    90: Launch(128, 256, 64, warps=8, stages=3, group=16, persistent=True, tma=True),
}

# Columns of dlogits at one time, at least: below that the products with them are too small for the
# GPU, and what is saved is less than dweight's own size.
SLICE = 2048
# Elements of dweight in fp32 at one time: 32 MiB stay in the L2 cache until they are rounded, and
# are 256 tiles of 128 x 256, a whole number of rounds over 132 multiprocessors but for 3 %.
PART = 1 << 23


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
    hidden, weight, targets = dense(hidden), dense(weight), targets.contiguous()
    dlogprob, lse = dlogprob.contiguous(), lse.contiguous()
    if dentropy is not None and entropy is not None:
        dentropy, entropy = dentropy.contiguous(), entropy.contiguous()
    rows, depth = hidden.shape
    vocabulary = weight.shape[0]
    if hidden.numel() == 0:
        return empty_like(hidden), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dweight = empty_like(weight)
    dhidden = torch.empty((rows, depth), dtype=torch.float32, device=hidden.device)
    launch = launch_for(BACKWARD, hidden, weight)
    columns = min(max(vocabulary // 8, SLICE), vocabulary)
    width = triton.cdiv(columns, 16) * 16  # rows of dlogits that begin on 32 bytes
    dlogits = hidden.new_empty(rows, width)
    part = max(PART // depth // launch.columns, 1) * launch.columns
    exact = hidden.dtype == torch.float32
    sums = None if exact else dhidden.new_empty(min(part, columns), depth)
    for first in range(0, vocabulary, columns):
        slice_ = weight[first : first + columns]
        size = slice_.shape[0]
        programs, options = logits_programs(launch, hidden, size)
        with torch.cuda.device_of(hidden):
            token_logprob_dlogits_kernel[(programs,)](
                *logits_operands(launch, hidden, slice_),
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
    def own(dtype: str) -> dict[str, str]:
        pointers = {"targets": "*i64:16", "dlogits": f"*{dtype}:16", "dlogprob": "*fp32:16"}
        return pointers | {"lse": "*fp32:16", "dlogits_stride": "i32:16", "first": "i32"}

    yield from cases(token_logprob_dlogits_kernel, BACKWARD, ("dentropy", "entropy"), own)
