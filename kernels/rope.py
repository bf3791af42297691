"""Rotary position embedding of queries and keys in one launch, and its inverse (Su et al. 2021).

Half-split pairs: (a, b) = (x[i], x[i + D/2]) -> (a cos - b sin, b cos + a sin). The gradient is the
rotation by the opposite angle, so the backward pass is the same kernel with sin negated.

A head of a token is a row of D/2 pairs, and a program takes a tile of rows: first come the programs
of q, then those of k, so that one launch serves both and small models fill their tiles too. The
heads of a token read the same row of the tables, from the L1 cache after the first. The head
dimension is a constant of a model and of the kernel: which accesses can be 16 bytes wide depends on
its divisibility by 8, and Triton only ever specialises arguments on 16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import architecture, empty_like, last_contiguous, launch_options
from llama2rt.kernels.aot import Case


@triton.jit
def _rotate(
    program,
    x,
    token_stride,
    head_stride,
    out,
    tokens,
    heads,
    cos,
    sin,
    table_rows,
    positions,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotates tile `program` of the tokens * heads rows of x."""
    first = program.to(tl.int64) * ROWS
    # One division in 64 bits; the rows of the tile follow in 32.
    first_token = first // heads
    within = (first - first_token * heads).to(tl.int32) + tl.arange(0, ROWS)
    token, head = first_token + within // heads, within % heads
    inside = token < tokens
    position = tl.load(positions + token, inside, other=0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    mask = inside[:, None] & (pair < HALF)
    # A position outside the tables gives NaN, and reads nothing outside them.
    known = mask & ((position >= 0) & (position < table_rows))[:, None]
    at = (position * HALF)[:, None] + pair
    c = tl.load(cos + at, known, other=float("nan"))
    s = tl.load(sin + at, known, other=float("nan"))
    if INVERSE:
        s = -s
    at = (token * token_stride + head * head_stride)[:, None] + pair
    a = tl.load(x + at, mask, other=0).to(tl.float32)
    b = tl.load(x + at + HALF, mask, other=0).to(tl.float32)
    at = ((first + tl.arange(0, ROWS)) * (2 * HALF))[:, None] + pair
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask)
    tl.store(out + at + HALF, (b * c + a * s).to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["q_programs", "tokens", "table_rows"])
def rope_kernel(
    q,
    q_token_stride,
    q_head_stride,
    q_out,
    q_heads,
    q_programs,
    k,
    k_token_stride,
    k_head_stride,
    k_out,
    k_heads,
    cos,
    sin,
    table_rows,
    positions,
    tokens,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,  # HALF rounded up to a power of two
    INVERSE: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_programs:
        _rotate(
            program,
            q,
            q_token_stride,
            q_head_stride,
            q_out,
            tokens,
            q_heads,
            cos,
            sin,
            table_rows,
            positions,
            HALF,
            ROWS,
            PAIRS,
            INVERSE,
        )
    else:
        _rotate(
            program - q_programs,
            k,
            k_token_stride,
            k_head_stride,
            k_out,
            tokens,
            k_heads,
            cos,
            sin,
            table_rows,
            positions,
            HALF,
            ROWS,
            PAIRS,
            INVERSE,
        )


@dataclass(frozen=True)
class Launch:
    num_warps: int
    pairs_per_thread: int

    def shape(self, half: int) -> tuple[int, int]:
        """(rows, pairs) of a program's tile for heads of `half` pairs."""
        pairs = triton.next_power_of_2(half)
        return max(1, 32 * self.num_warps * self.pairs_per_thread // pairs), pairs


# 8 pairs are one load of 16 bytes from each half in bf16, and two from each table. More would not
# put more bytes in flight: registers grow as fast, and fewer programs fit a multiprocessor.
LAUNCH = {arch: Launch(num_warps=4, pairs_per_thread=8) for arch in (80, 90)}


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty_like(q), empty_like(k)
    tokens, q_heads, dim = q.shape
    k_heads = k.shape[1]
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k, positions = last_contiguous(q), last_contiguous(k), positions.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    launch = LAUNCH[architecture(q)]
    rows, pairs = launch.shape(dim // 2)
    q_programs, k_programs = (triton.cdiv(tokens * heads, rows) for heads in (q_heads, k_heads))
    with torch.cuda.device_of(q):
        rope_kernel[(q_programs + k_programs,)](
            q,
            q.stride(0),
            q.stride(1),
            q_out,
            q_heads,
            q_programs,
            k,
            k.stride(0),
            k.stride(1),
            k_out,
            k_heads,
            cos,
            sin,
            cos.shape[0],
            positions,
            tokens,
            HALF=dim // 2,
            ROWS=rows,
            PAIRS=pairs,
            INVERSE=inverse,
            **launch_options(launch.num_warps),
        )
    return q_out, k_out


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], tables [P, D/2] -> both rotated; NaN for a position outside."""
    return _rope(q, k, cos, sin, positions, inverse=False)


def rope_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients rotated back."""
    return _rope(dq, dk, cos, sin, positions, inverse=True)


def aot_cases() -> Iterator[Case]:
    """Heads of 128 in both element sizes, and of 48 (a tile a quarter empty)."""
    launch = LAUNCH[80]
    for dtype, half, inverse in (
        ("bf16", 64, False),
        ("bf16", 64, True),
        ("bf16", 24, False),
        ("fp32", 64, False),
    ):
        rows, pairs = launch.shape(half)
        strides = [f"{x}_{kind}_stride" for x in "qk" for kind in ("token", "head")]
        yield Case(
            f"rope{'_backward' * inverse} {dtype} head dim {2 * half}",
            rope_kernel,
            dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{dtype}:16")
            | dict.fromkeys(("cos", "sin"), "*fp32:16")
            | dict.fromkeys(strides, "i32:16")
            | dict.fromkeys(("q_heads", "k_heads", "q_programs", "tokens", "table_rows"), "i32")
            | {"positions": "*i32:16"},
            {"HALF": half, "ROWS": rows, "PAIRS": pairs, "INVERSE": inverse},
            launch.num_warps,
        )
