"""The embedding's lookup, with a gradient that is summed in fp32.

torch 2.13 adds the gradient's rows one by one in the weight's dtype on a CPU. In bf16 a sum of ones
then stops at 256, and a frequent token's row loses most of what it should learn, without an error.
(`index_select` is right there only with int64 ids and where its rows are summed by FBGEMM.) Here
the rows of one token are brought together by a stable sort and summed by `embedding_bag`, which
keeps fp32 sums in any 16-bit dtype, on any device and in a fixed order: the same bits every time,
no atomics. It costs what torch's own gradient costs.

This is no op of the public contract: backends have nothing of their own to put in its place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama2rt.ops.registration import autograd

_LIB = torch.library.Library("llama2rt", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _lookup(weight: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight)


def _row_sums(dy: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """dy [..., dim] summed over the positions of each token, in a weight's shape [rows, dim]."""
    if tokens.numel() == 0:
        return dy.new_zeros(rows, dy.shape[-1])
    ordered, order = tokens.flatten().sort(stable=True)
    used, counts = ordered.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    # Contiguous, because other strides take another of torch's kernels, which rounds otherwise.
    gradients = dy.reshape(-1, dy.shape[-1]).contiguous()
    sums = F.embedding_bag(order, gradients, starts, mode="sum")
    if len(used) == rows:  # as where documents share keys: no row but has its readers
        return sums
    return dy.new_zeros(rows, dy.shape[-1]).index_copy_(0, used.long(), sums)


def _define(schema: str, run: Any, fake: Any) -> Any:
    name = schema.partition("(")[0]
    _LIB.define(schema, tags=_TAGS)
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llama2rt::{name}", fake, lib=_LIB)
    return getattr(torch.ops.llama2rt, name).default


_embedding = _define(
    "embedding(Tensor weight, Tensor tokens) -> Tensor",
    _lookup,
    lambda weight, tokens: weight.new_empty(*tokens.shape, weight.shape[1]),
)
_embedding_backward = _define(
    "embedding_backward(Tensor dy, Tensor tokens, SymInt rows) -> Tensor",
    _row_sums,
    lambda dy, tokens, rows: dy.new_empty(rows, dy.shape[-1]),
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, tokens = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (tokens,) = ctx.saved_tensors
    return _embedding_backward(dy, tokens, ctx.rows), None


autograd("embedding", _backward, _setup)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, dim] at tokens [...] (int32 or int64) -> [..., dim], in weight's dtype.

    The gradient of weight is [V, dim] in its dtype, each row summed in fp32 (fp64 for fp64) and
    rounded once; bitwise repeatable. IndexError (CPU) for a token outside 0..V-1.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _embedding(weight, tokens)
    return F.embedding(tokens, weight)
