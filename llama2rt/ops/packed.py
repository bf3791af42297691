"""Weights in the layout that a CPU reads fastest, and a language model on them.

A step of decoding is a walk through the weights. In panels (csrc/cpu/panels.h) they are read from
front to back, once for up to 64 rows, also as int8. The copy costs as much memory as it holds.
`_cpu` alone has the layout; nothing of it is differentiable, and no op of the public contract takes
it. Left out: activations in int8 (csrc/cpu/packed_linear.cpp says what they would cost).
"""

import ctypes
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend

STORAGES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COLUMNS = 32
"""of a panel"""


def native() -> Any:
    """`llama2rt._cpu`. Not imported at the top: where it was not built, this file still is."""
    return importlib.import_module("llama2rt._cpu")


def why_not(weight: Tensor) -> str:
    """Why a model with this weight does not run on packed ones; "" if it can."""
    if type(weight) not in backend.PLAIN_TENSORS:
        return f"its weights are of the type {type(weight).__name__}"
    if weight.device.type != "cpu":
        return f"its weights are on {weight.device}"
    if weight.dtype not in STORAGES:
        return f"its weights are of {weight.dtype}"
    if (chosen := backend.resolve(weight)) != "cpu":
        return f"ops run on the backend {chosen!r}"
    return ""


_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14  # of Linux's madvise(2)


def memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] for packed weights, not filled; where Linux takes such advice in pages of 2
    MiB: a walk through weights in pages of 4 KiB waits for their addresses."""
    whole = torch.empty(nbytes + _HUGE_PAGE, dtype=torch.uint8)
    begin = -whole.data_ptr() % _HUGE_PAGE
    found = whole[begin : begin + nbytes]
    if sys.platform == "linux" and nbytes >= _HUGE_PAGE:
        address, length = ctypes.c_void_p(found.data_ptr()), ctypes.c_size_t(nbytes)
        ctypes.CDLL(None).madvise(address, length, _MADV_HUGEPAGE)
    return found


def packed_bytes(storage: str, columns: int, inner: int) -> int:
    """Bytes of a weight [columns, inner] in panels, to a multiple of a cache line."""
    return -(-native().packed_bytes(storage, columns, inner) // 64) * 64


class PackedWeight:
    """The weights [N, K] of linear layers that read one input, one below another, in panels.

    storage: "fp32", "bf16" or "fp16", which is the weights' dtype, or "int8": each row in steps of
    its largest absolute value / 127, which keeps it to within half such a step. data: the memory,
    `packed_bytes` of uint8.
    """

    def __init__(self, storage: str, columns: int, inner: int, data: Tensor | None = None) -> None:
        module = native()
        self.shape, self.storage = (columns, inner), storage
        self._data = memory(packed_bytes(storage, columns, inner)) if data is None else data
        self._scales: Tensor | None = None
        if storage == "int8":
            self._scales = torch.empty(-(-columns // COLUMNS) * COLUMNS)
        self.native = module.PackedWeight(self._data, self._scales, columns, inner, storage)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def fill(self, weights: Sequence[Tensor]) -> None:
        """The numbers of up to three weights, [.., K] each and N rows in all, contiguous."""
        assert sum(len(weight) for weight in weights) == self.shape[0]
        assert all(weight.shape[1:] == self.shape[1:] for weight in weights)
        parts = [*weights, None, None][:3]
        native().pack_weight(*parts, False, self.native, torch.get_num_threads())

    def linear(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, K] -> x weight^T [T, N], summed in fp32, in x's dtype or fp32. A row's bits do not
        depend on the other rows, nor on the number of threads. With int8 weights, 128 numbers each
        of a 16-bit x become int16 of a common scale: to within 2^-16 of the largest of them."""
        if x.dim() != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"x: expected shape [T, {self.shape[1]}], got {list(x.shape)}")
        if x.dtype != torch.float32 and dtype not in (None, x.dtype, torch.float32):
            raise ValueError(f"dtype: expected {x.dtype} or float32, got {dtype}")
        x = x if x.stride(-1) == 1 else x.contiguous()
        y = x.new_empty(x.shape[0], self.shape[0], dtype=dtype or x.dtype)
        native().packed_linear(x, self.native, y, torch.get_num_threads())
        return y


def pack(weights: Sequence[Tensor], storage: str | None = None) -> PackedWeight:
    """The weights [N, K] of layers that read one input, in panels; `storage`: by default theirs."""
    weights = [weight.detach().contiguous() for weight in weights]
    first = weights[0]
    columns = sum(len(weight) for weight in weights)
    packed = PackedWeight(storage or STORAGES[first.dtype], columns, first.shape[1])
    packed.fill(weights)
    return packed


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number of the tensors' bits, at the speed of reading them: where one differs, so does it.
    Contiguous tensors. torch's own count of changes misses what is written through `.data`."""
    return native().fingerprint([tensor.detach() for tensor in tensors], torch.get_num_threads())
