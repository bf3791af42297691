"""Matrix products that torch does slower: of a few rows, and of a bf16 weight gradient."""

import torch
from torch import Tensor

from llama2rt import _cpu  # after torch (see CMakeLists.txt)
from llama2rt.ops.tensors import last_contiguous


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> x weight^T [T, N]; made for a handful of rows."""
    x, weight = last_contiguous(x), last_contiguous(weight)
    y = x.new_empty(x.shape[0], weight.shape[0])
    _cpu.linear(x, weight, y, torch.get_num_threads())
    return y


def blocked_linear(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """x [T, K], weight [N, K], or `transposed` [K, N], one dtype -> x weight^T [T, N], summed in
    fp32; made for hundreds of rows. A row's bits do not depend on the other rows."""
    x, weight = last_contiguous(x), last_contiguous(weight)
    y = x.new_empty(x.shape[0], weight.shape[int(transposed)])
    _cpu.blocked_linear(x, weight, transposed, y, torch.get_num_threads())
    return y


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """dy [T, N], x [T, K], one dtype -> dy^T x [N, K], summed in fp32: the gradient of `linear`'s
    weight. out: contiguous."""
    out = x.new_empty(dy.shape[1], x.shape[1]) if out is None else out
    dy, x = last_contiguous(dy), last_contiguous(x)
    _cpu.weight_gradient(dy, x, out, None, torch.get_num_threads())
    return out


def add_weight_gradient(acc: Tensor, dy: Tensor, x: Tensor) -> None:
    """acc (fp32, contiguous) += dy^T x, of any of the three dtypes."""
    dy, x = last_contiguous(dy), last_contiguous(x)
    _cpu.weight_gradient(dy, x, None, acc, torch.get_num_threads())


def add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc (fp32, contiguous) += a @ b."""
    if a.dtype == torch.float32:
        acc.addmm_(a, b)
    else:
        _cpu.add_to(torch.mm(a, b), acc, torch.get_num_threads())
