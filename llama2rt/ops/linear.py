"""The linear layer: torch's product, except of 16-bit rows where torch's is slow, or is compiled
for each number of rows.

A step of decoding, of a few rows, is a walk through the weights, and torch's product of bf16 or
fp16 takes several times what reading them takes. `_cpu` has a kernel for it, which has no gradient
and is used only where none is recorded.

Of hundreds of rows torch's product of bf16 is oneDNN's, which compiles itself for each number of
rows that it has not met: a millisecond and half a megabyte each time (torch 2.13, AVX-512), and
batches of documents rarely have a number of tokens twice. Where the processor multiplies bf16 and
has no AMX, of which oneDNN makes more, all three products are `_cpu`'s.

On CPUs without AVX-512 torch has no blocked product of 16-bit numbers at all, but a plain loop: the
gradient of a layer's input is thirty times slower than in fp32 (torch 2.13, Zen 3). There all three
products of a layer, forward and backward, run in fp32 and are rounded once, which is what a 16-bit
product is. None of these is an op of the public contract.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from llama2rt.ops import backend
from llama2rt.ops.registration import refuse_second_derivative

FEW_ROWS = "few_rows_linear"  # the kernel's name as an operator
MOST_ROWS = 4  # beyond, the library's blocked product is as fast or faster
BLOCKED, GRADIENT = "blocked_linear", "weight_gradient"  # operators of many rows
# Those that repay arranging the weight anew: of a weight of SMALL numbers, which caches hold, and
# of a larger one.
MANY_ROWS, SMALL, MORE_ROWS = 256, 1 << 20, 1024
_DTYPES = (torch.bfloat16, torch.float16)
# Those that oneDNN multiplies on this CPU.
_BY_ONEDNN = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
_LIB = torch.library.Library("llama2rt", "FRAGMENT")


@functools.cache
def _native() -> Any:
    # Not at the top: without `_cpu` the module does not import, and nothing gets here.
    return importlib.import_module("llama2rt.ops.cpu")


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    return _native().linear(x, weight)


def _blocked(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return _native().blocked_linear(x, weight, transposed)


def _gradient(dy: Tensor, x: Tensor) -> Tensor:
    return _native().weight_gradient(dy, x)


def _operator(schema: str, run: Callable, fake: Callable) -> Callable[..., Tensor]:
    """`run` as an operator where something wants to see it, and directly, which is cheaper, where
    nothing does."""
    name = schema.partition("(")[0]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, run, "CPU")
    torch.library.register_fake(f"llama2rt::{name}", fake, lib=_LIB)
    overload = getattr(torch.ops.llama2rt, name).default

    def call(x: Tensor, y: Tensor, *settings: bool) -> Tensor:
        seen = backend.needs_dispatcher(x, y)
        return overload(x, y, *settings) if seen else run(x, y, *settings)

    return call


_few_rows_linear = _operator(
    f"{FEW_ROWS}(Tensor x, Tensor weight) -> Tensor",
    _few_rows,
    lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
)
_blocked_linear = _operator(
    f"{BLOCKED}(Tensor x, Tensor weight, bool transposed) -> Tensor",
    _blocked,
    lambda x, weight, transposed: x.new_empty(x.shape[0], weight.shape[int(transposed)]),
)
_weight_gradient = _operator(
    f"{GRADIENT}(Tensor dy, Tensor x) -> Tensor",
    _gradient,
    lambda dy, x: x.new_empty(dy.shape[1], x.shape[1]),
)


class _Blocked(torch.autograd.Function):
    """x weight^T of bf16 matrices of many rows and its gradients, for which is kept what `F.linear`
    keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _blocked_linear(x, weight, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative(BLOCKED)
        x, weight = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(dy):  # is_grads_batched: several at once
            return None if weight is None else dy @ weight, None if x is None else dy.T @ x
        dx = None if weight is None else _blocked_linear(dy, weight, True)
        return dx, None if x is None else _weight_gradient(dy, x)


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
    return not _BY_ONEDNN.get(dtype, False)


def _own_blocked() -> bool:
    """Whether `_cpu` multiplies bf16 in pairs, and torch not in tiles."""
    native = importlib.import_module("llama2rt._cpu")
    return native.isa() == "avx512bf16" and not native.has_amx()


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is one product of matrices as they lie in memory, and nothing but its result and
    gradients is asked for."""
    return (
        weight.dtype == x.dtype
        and weight.device == x.device
        and x.layout == weight.layout == torch.strided
        and type(x) in backend.PLAIN_TENSORS
        and type(weight) in backend.PLAIN_TENSORS
        and not torch.is_autocast_enabled("cpu")
        # vmap, forward mode and traces go through torch's own product.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def _is_for_panels(x: Tensor, weight: Tensor) -> bool:
    if not (x.dtype == torch.bfloat16 and x.dim() == weight.dim() == 2):
        return False
    most = weight.numel()
    return (
        x.shape[0] >= (MANY_ROWS if most <= SMALL else MORE_ROWS)
        and x.shape[1] == weight.shape[1]
        and most > 0
        and not torch.compiler.is_compiling()
        and backend.resolve(x) == "cpu"
        and _own_blocked()
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype not in _DTYPES or x.dim() < 2 or not _is_plain(x, weight):
        return F.linear(x, weight)
    product: Tensor
    if not _BY_ONEDNN[x.dtype]:
        product = _InFp32.apply(x, weight)
    elif _is_for_panels(x, weight):
        product = _Blocked.apply(x, weight)
    else:
        product = F.linear(x, weight)
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
    return _few_rows_linear(x, weight)
