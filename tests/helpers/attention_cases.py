"""Attention judged by `numerics`, whatever runs it.

Yardsticks in the same dtype, one document at a time: torch's own attention (`sdpa`), or its formula
in plain torch (`softmax_attention`), which rounds the probabilities to that dtype.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from numerics import draw, judge, judge_gradients, leaves_of, wide
from torch import Tensor

from llama2rt.ops import reference


class Functions(Protocol):
    attention: Callable
    attention_backward: Callable


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens [B+1] of documents of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def both_directions(
    run: Functions, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv); `rest` is what follows v."""
    out, lse = run.attention(q, k, v, *rest)
    return out, lse, *run.attention_backward(dout, q, k, v, out, lse, *rest)


def one_document(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """[Hq, T, D] by SDPA from q and k, v [Hkv, S, D]."""
    rows, columns = q.shape[1], k.shape[1]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
    mask = seen.tril(columns - rows) if causal else None
    q, k, v = (x[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0]


def softmax_of_one_document(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """The same by products and a softmax in fp32."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * scale
    if causal:
        rows, columns = scores.shape[1:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(columns - rows + 1), -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype).nan_to_num(0.0) @ v


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequence[int],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    *,
    document: Callable[..., Tensor] = one_document,
) -> Tensor:
    """[T, Hq, D] of packed documents; `document` computes each."""
    parts = []
    for one in zip(q.split(list(queries)), k.split(list(keys)), v.split(list(keys)), strict=True):
        if 0 in (len(one[0]), len(one[1])):
            parts.append(torch.zeros_like(one[0]))
        else:
            heads_first = (x.transpose(0, 1) for x in one)
            parts.append(document(*heads_first, causal, scale).transpose(0, 1))
    # What a row that sees no key gives torch depends on the device: NaN, or 0 as here.
    return torch.cat(parts).nan_to_num(0.0)


softmax_attention = functools.partial(sdpa, document=softmax_of_one_document)


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
    query_kind: str | None = None,
    causal: bool = True,
    scale: float | None = None,
    max_seqlen: int = 0,
    device: str = "cpu",
    yardstick: Callable[..., Tensor] = sdpa,
) -> tuple[Tensor, ...]:
    """Judges both directions; (out, lse, dq, dk, dv). No input is changed.

    `kind` is that of v, and of q where `query_kind` names no other.
    """
    keys = queries if keys is None else keys
    scale = dim**-0.5 if scale is None else scale
    drawn = (
        draw((sum(queries), heads, dim), dtype, "normal", seed),
        draw((sum(queries), heads, dim), dtype, query_kind or kind, seed + 1),
        draw((sum(keys), kv_heads, dim), dtype, "normal", seed + 2),
        draw((sum(keys), kv_heads, dim), dtype, kind, seed + 3),
    )
    dout, q, k, v = (x.to(device) for x in drawn)
    cu_q, cu_k = (offsets(lengths).to(device) for lengths in (queries, keys))
    rest = (cu_q, cu_k, max_seqlen, causal, scale)
    out, lse = run.attention(q, k, v, *rest)
    exact, exact_lse = reference.attention(*wide(q, k, v), *rest)
    leaves = leaves_of(q, k, v)
    theirs = yardstick(*leaves, queries, keys, causal, scale)
    judge("out", out, exact, theirs.detach())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    gradients = run.attention_backward(dout, q, k, v, out, lse, *rest)
    expected = reference.attention_backward(*wide(dout, q, k, v), exact, exact_lse, *rest)
    # A row that sees no key may give torch NaN gradients, which are 0.
    same_dtype = [x.nan_to_num(0.0) for x in torch.autograd.grad(theirs, leaves, dout)]
    judge_gradients("dq dk dv", gradients, expected, same_dtype)
    for before, after in zip(drawn, (dout, q, k, v), strict=True):
        assert torch.equal(before, after.cpu()), "an input was changed"
    return out, lse, *gradients
