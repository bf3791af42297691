"""Attention judged by `numerics`, whatever runs it: the CUDA kernels on the emulator or on a GPU.

Yardstick in the same dtype: torch's own attention (SDPA), one document at a time.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from numerics import draw, judge
from torch import Tensor

from llama2rt.ops import reference


class Functions(Protocol):
    attention: Callable
    attention_backward: Callable


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequence[int],
    keys: Sequence[int],
    causal: bool,
    scale: float,
) -> Tensor:
    parts = []
    for one, two, three in zip(
        q.split(list(queries)), k.split(list(keys)), v.split(list(keys)), strict=True
    ):
        rows, columns = len(one), len(two)
        if rows == 0 or columns == 0:
            parts.append(torch.zeros_like(one))
            continue
        one, two, three = (x.transpose(0, 1)[None] for x in (one, two, three))
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
        mask = seen.tril(columns - rows) if causal else None
        out = F.scaled_dot_product_attention(one, two, three, mask, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    # What a row that sees no key gives torch depends on the device: NaN, or 0 as here.
    return torch.cat(parts).nan_to_num(0.0)


def check(
    run: Functions,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int,
    *,
    queries: Sequence[int],
    keys: Sequence[int] | None = None,
    kind: str = "normal",
    causal: bool = True,
    scale: float | None = None,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """Judges both directions; (out, lse, dq, dk, dv). No input is changed."""
    keys = queries if keys is None else keys
    scale = dim**-0.5 if scale is None else scale
    drawn = (
        draw((sum(queries), heads, dim), dtype, "normal", seed),
        draw((sum(queries), heads, dim), dtype, kind, seed + 1),
        draw((sum(keys), kv_heads, dim), dtype, "normal", seed + 2),
        draw((sum(keys), kv_heads, dim), dtype, kind, seed + 3),
    )
    dout, q, k, v = (x.to(device) for x in drawn)
    rest = (offsets(queries).to(device), offsets(keys).to(device), 0, causal, scale)
    out, lse = run.attention(q, k, v, *rest)
    wide = [x.double() for x in (dout, q, k, v)]
    exact, exact_lse = reference.attention(*wide[1:], *rest)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = sdpa(*leaves, queries, keys, causal, scale)
    judge("out", out, exact, theirs.detach())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    gradients = run.attention_backward(dout, q, k, v, out, lse, *rest)
    expected = reference.attention_backward(*wide, exact, exact_lse, *rest)
    # A row that sees no key may give torch NaN gradients, which are 0.
    yardstick = [x.nan_to_num(0.0) for x in torch.autograd.grad(theirs, leaves, dout)]
    for name, *three in zip(("dq", "dk", "dv"), gradients, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)
    for before, after in zip(drawn, (dout, q, k, v), strict=True):
        assert torch.equal(before, after.cpu()), "an input was changed"
    return out, lse, *gradients
