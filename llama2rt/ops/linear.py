"""The linear layer: torch's product, except where 16-bit rows meet a CPU that torch is slow on.

A step of decoding, of a few rows, is a walk through the weights, and torch's product of bf16 or
fp16 takes several times what reading them takes. `_cpu` has a kernel for it, which has no gradient
and is used only where none is recorded.

On CPUs without AVX-512 torch has no blocked product of 16-bit numbers at all, but a plain loop: the
gradient of a layer's input is thirty times slower than in fp32 (torch 2.13, Zen 3). There all three
products of a layer, forward and backward, run in fp32 and are rounded once, which is what a 16-bit
product is. Neither is an op of the public contract.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama2rt.ops import backend

FEW_ROWS = "few_rows_linear"  # the kernel's name as an operator
MOST_ROWS = 4  # beyond, the library's blocked product is as fast or faster
_DTYPES = (torch.bfloat16, torch.float16)
# Those that oneDNN multiplies on this CPU.
_BLOCKED = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
_LIB = torch.library.Library("llama2rt", "FRAGMENT")


@functools.cache
def _kernel() -> Callable[[Tensor, Tensor], Tensor]:
    # Not at the top: without `_cpu` the module does not import, and nothing gets here.
    return importlib.import_module("llama2rt.ops.cpu").linear


def _run(x: Tensor, weight: Tensor) -> Tensor:
    return _kernel()(x, weight)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_LIB.define(f"{FEW_ROWS}(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.impl(FEW_ROWS, _run, "CPU")
torch.library.register_fake(f"llama2rt::{FEW_ROWS}", _fake, lib=_LIB)
_few_rows_linear = torch.ops.llama2rt.few_rows_linear.default


class _InFp32(torch.autograd.Function):
    """x weight^T of 16-bit tensors and its gradients, for which is kept what `F.linear` keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        rows = dy.float()
        dx = (rows @ weight.float()).to(dy.dtype) if needs_x else None
        if not needs_weight:
            return dx, None
        dw = rows.flatten(0, -2).T @ x.float().flatten(0, -2)
        return dx, dw.to(dy.dtype)


def rounds_alike(dtype: torch.dtype) -> bool:
    """Whether rows of this dtype, on this CPU, have the same bits whatever rows stand beside them.
    Those of oneDNN's 16-bit products do not."""
    return not _BLOCKED.get(dtype, False)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if (
        x.device.type != "cpu"
        or _BLOCKED.get(x.dtype, True)
        or weight.dtype != x.dtype
        or x.dim() < 2
        or type(x) not in backend.PLAIN_TENSORS
        or type(weight) not in backend.PLAIN_TENSORS
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight)
    product: Tensor = _InFp32.apply(x, weight)
    return product


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K], one dtype -> x weight^T [T, N], summed in fp32.

    The same values as F.linear but for the order of sums. What the kernel does not take, wrong
    shapes among it, is F.linear's to compute or to refuse.
    """
    if (
        torch.is_grad_enabled()
        or x.dtype not in _DTYPES
        or x.device.type != "cpu"
        or x.dim() != 2
        or x.shape[0] > MOST_ROWS
        or weight.dim() != 2
        or weight.shape[1] != x.shape[1]
        or weight.dtype != x.dtype
        or weight.device != x.device
        or type(x) not in backend.PLAIN_TENSORS
        or type(weight) not in backend.PLAIN_TENSORS
        or torch.is_autocast_enabled("cpu")
        or backend.resolve(x) != "cpu"
    ):
        return _product(x, weight)
    if backend.needs_dispatcher(x, weight):
        return _few_rows_linear(x, weight)
    return _run(x, weight)
