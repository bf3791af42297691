"""SiLU(gate) * up and its gradient (Shazeer 2020): elementwise, so nothing but memory traffic.

    y = gate s up,  with s = sigmoid(gate)
    dup = dy gate s;  dgate = dy up s (1 + gate (1 - s))

The backward pass computes s again rather than read anything the forward pass would have to write.
Dense operands are one long row; halves of a fused projection have rows apart and are read in place.
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
def _block(columns, BLOCK: tl.constexpr):
    """(row, columns of it) of this program; programs are counted along a row first."""
    blocks = (columns - 1) // BLOCK + 1  # cdiv would add first, beyond 32 bits
    row = tl.program_id(0) // blocks
    start = (tl.program_id(0) - row * blocks).to(tl.int64) * BLOCK
    return row.to(tl.int64), start + tl.arange(0, BLOCK)


@triton.jit
def swiglu_kernel(gate, gate_stride, up, up_stride, y, columns, BLOCK: tl.constexpr):
    row, column = _block(columns, BLOCK)
    mask = column < columns
    g = tl.load(gate + row * gate_stride + column, mask, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask, other=0).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask)


@triton.jit
def swiglu_backward_kernel(
    dy, dy_stride, gate, gate_stride, up, up_stride, dgate, dup, columns, BLOCK: tl.constexpr
):
    row, column = _block(columns, BLOCK)
    mask = column < columns
    d = tl.load(dy + row * dy_stride + column, mask, other=0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    at = row * columns + column
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask)
    result = d * u * s * (1 + g * (1 - s))
    tl.store(dgate + at, result.to(dgate.dtype.element_ty), mask)


@dataclass(frozen=True)
class Launch:
    num_warps: int
    bytes_per_thread: int
    """Of each operand: loads of 16 bytes that a thread has in flight."""

    def block(self, element_bytes: int) -> int:
        """Elements of a program's block."""
        return 32 * self.num_warps * self.bytes_per_thread // element_bytes


# Small blocks: a multiprocessor then holds 16 programs of 4 warps (A100: 2048 threads, at most 32
# registers each; here under 64, so 8 to 16), whose 2 or 3 loads of 32 bytes a thread make at least
# 64 KiB in flight, twice what 4.8 TB/s over 132 multiprocessors move in 800 ns.
LAUNCH = {arch: Launch(num_warps=4, bytes_per_thread=32) for arch in (80, 90)}


def _rows(*operands: Tensor) -> tuple[int, int, list[Tensor]]:
    """(rows, columns, operands as the kernel reads them): one row where all operands are dense."""
    if all(x.is_contiguous() for x in operands):
        return 1, operands[0].numel(), [x.view(1, -1) for x in operands]
    return *operands[0].shape, [last_contiguous(x) for x in operands]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [T, F] -> silu(gate) * up."""
    y = empty_like(gate)
    if y.numel() == 0:
        return y
    rows, columns, (gate, up) = _rows(gate, up)
    launch = LAUNCH[architecture(gate)]
    block = launch.block(gate.element_size())
    with torch.cuda.device_of(gate):
        swiglu_kernel[(rows * triton.cdiv(columns, block),)](
            gate,
            gate.stride(0),
            up,
            up.stride(0),
            y,
            columns,
            BLOCK=block,
            **launch_options(launch.num_warps),
        )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate, gradient of up)."""
    dgate, dup = empty_like(gate), empty_like(up)
    if dup.numel() == 0:
        return dgate, dup
    rows, columns, (dy, gate, up) = _rows(dy, gate, up)
    launch = LAUNCH[architecture(gate)]
    block = launch.block(gate.element_size())
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(rows * triton.cdiv(columns, block),)](
            dy,
            dy.stride(0),
            gate,
            gate.stride(0),
            up,
            up.stride(0),
            dgate,
            dup,
            columns,
            BLOCK=block,
            **launch_options(launch.num_warps),
        )
    return dgate, dup


def aot_cases() -> Iterator[Case]:
    """Dense operands, in both element sizes."""
    launch = LAUNCH[80]
    for dtype, element_bytes in (("bf16", 2), ("fp32", 4)):
        pointer = f"*{dtype}:16"
        sizes = {"BLOCK": launch.block(element_bytes)}
        strides = dict.fromkeys(("gate_stride", "up_stride", "columns"), "i32:16")
        for name, kernel, pointers, numbers in (
            ("swiglu", swiglu_kernel, ("gate", "up", "y"), strides),
            (
                "swiglu_backward",
                swiglu_backward_kernel,
                ("dy", "gate", "up", "dgate", "dup"),
                {"dy_stride": "i32:16", **strides},
            ),
        ):
            signature = dict.fromkeys(pointers, pointer) | numbers
            yield Case(f"{name} {dtype}", kernel, signature, sizes, launch.num_warps)
