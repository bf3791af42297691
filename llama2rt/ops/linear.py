"""The linear layer of inference: torch's product, except where a few 16-bit rows meet a CPU.

There, a step of decoding is a walk through the weights, and torch's product of bf16 or fp16 takes
several times what reading them takes. `_cpu` has a kernel for it. This is no op of the public
contract: it has no gradient and is used only where none is recorded, so that training and every
other device, dtype, backend and number of rows run torch's own.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llama2rt.ops import backend

FEW_ROWS = "few_rows_linear"  # the kernel's name as an operator
MOST_ROWS = 4  # beyond, the library's blocked product is as fast or faster
_DTYPES = (torch.bfloat16, torch.float16)
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
        return F.linear(x, weight)
    if backend.needs_dispatcher(x, weight):
        return _few_rows_linear(x, weight)
    return _run(x, weight)
