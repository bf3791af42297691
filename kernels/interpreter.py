"""Repairs of Triton 3.6's interpreter, imported under TRITON_INTERPRET=1 and never otherwise.

Without them it computes other numbers than a GPU would: casts to bf16 truncate, `tl.dot` multiplies
the bit patterns of bf16 operands as integers. And int() of an array of one element, which loop
bounds are, is refused by numpy from 2.4 on. Arithmetic on bf16 stays wrong: kernels do none.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot, _patch_tensor = (
    InterpreterBuilder.cast_impl,
    InterpreterBuilder.create_dot,
    interpreter._patch_lang_tensor,
)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest bf16, ties to even, as uint16."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 values -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    pair = src.dtype.scalar, dst_type.scalar
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle(to_bf16(np.ascontiguousarray(src.data)), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle(to_fp32(src.data), tl.float32)
    return _cast(self, src, dst_type)


def _create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    a, b = (
        TensorHandle(to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return _dot(self, a, b, *rest)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_dot = _create_dot
interpreter._patch_lang_tensor = _patch_lang_tensor
