"""Collectives along the first dimension of activations, with their gradients.

What a gradient is depends on what follows. Ranks that go on with different parts of the work each
have a part of the gradient, and the parts are summed; ranks that all do the same have the whole of
it already, and each takes what is its own. Every rank of a group passes the same shape.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed both, and warns of the older names, which are the only ones before it.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] of each of N ranks -> [N n, ...], without a gradient."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """[N n, ...] on each of N ranks -> each its own [n, ...] of the sum, without a gradient."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradients[0], ctx.group), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].narrow(0, ctx.group.rank() * ctx.rows, ctx.rows), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradients[0], ctx.group), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] of each of N ranks -> [N n, ...] on all. Its gradients are summed over the ranks:
    for ranks that go on with different parts of the work."""
    return _Gather.apply(x, group)


def gather_alike(x: Tensor, group: ProcessGroup) -> Tensor:
    """The same for ranks that all do the same with the result: each takes its own rows of the
    gradient, and nothing is sent."""
    return _GatherAlike.apply(x, group)


def scatter_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """[N n, ...], a part of a sum on each of N ranks -> [n, ...], each rank's rows of the sum."""
    return _ScatterSum.apply(x, group)


def sum_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, the same on all ranks; its gradients are summed over them."""
    return _SumGradient.apply(x, group)
