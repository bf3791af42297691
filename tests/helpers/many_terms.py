"""Sums of thousands of equal terms, in every place where a kernel adds many values into one.

A sum kept in bf16 stops growing at 256 ones (in fp16 at 2048): what is added is then lost without
an error. The right value of each case is a number that one can work out by hand. `run` has the
functions of a backend as attributes.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _near(value: Tensor, expected: float) -> None:
    """Every element is `expected`, but for a few roundings to 16 bits."""
    assert value.float().min().item() == pytest.approx(expected, rel=2**-6)
    assert value.float().max().item() == pytest.approx(expected, rel=2**-6)


def check_norms(run: Any, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """The weight's gradient: n rows."""
    x = torch.ones(n, 16, dtype=dtype, device=device)
    weight = x[0].clone()
    _, rstd = run.rms_norm(x, weight, 1e-6)
    _near(run.rms_norm_backward(x, x, weight, rstd)[1], n)
    for further in (None, x):
        _near(run.add_rms_norm_backward(x, further, x, weight, rstd)[1], n)


def check_attention(run: Any, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """n queries of one key (its gradients), one query of n keys (its output and gradient)."""
    dim, scale = 16, 0.25

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        cu = [_offsets(len(x)).to(device) for x in (q, k)]
        settings = (*cu, len(q), False, scale)
        out, lse = run.attention(q, k, v, *settings)
        return out, lse, *run.attention_backward(torch.ones_like(q), q, k, v, out, lse, *settings)

    def filled(rows: int, value: float) -> Tensor:
        return torch.full((rows, 1, dim), value, dtype=dtype, device=device)

    halves = torch.cat([filled(n // 2, 1.0), filled(n // 2, -1.0)])
    # Two keys of probability 1/2, whose values are 1 and -1: dS = +-dim / 2 for each query.
    two = torch.cat([filled(1, 1.0), filled(1, -1.0)])
    *_, dk, dv = attend(filled(n, 1.0), filled(2, 0.0), two)
    _near(dv, n / 2)
    _near(dk[0], scale * n * dim / 2)
    _near(dk[1], -scale * n * dim / 2)
    # n keys of probability 1/n.
    out, lse, *_ = attend(filled(1, 0.0), halves, filled(n, 1.0))
    _near(out, 1.0)
    _near(lse, math.log(n))
    _, _, dq, *_ = attend(filled(1, 0.0), halves, halves)
    _near(dq, scale * dim)


def check_decode_attention(run: Any, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """One query over n cached keys."""
    cache = torch.ones(n // 16, 16, 1, 16, dtype=dtype, device=device)
    table = torch.arange(n // 16, dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([n], dtype=torch.int32, device=device)
    _near(run.decode_attention(cache[0, :1], cache, cache, table, lengths, 0.25), 1.0)


def check_token_logprob(run: Any, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """The gradient of weight over n tokens, that of hidden over a vocabulary of n."""

    def grad(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=device)
        logprob, _, lse = run.token_logprob(hidden, weight, targets, 1.0, False)
        ones = torch.ones_like(lse)
        return logprob, *run.token_logprob_backward(
            ones, None, hidden, weight, targets, lse, None, 1.0
        )

    factory = {"dtype": dtype, "device": device}
    _, _, dweight = grad(torch.ones(n, 16, **factory), torch.zeros(8, 16, **factory))
    _near(dweight[0], n * 7 / 8)
    _near(dweight[1:], -n / 8)
    weight = torch.ones(n, 16, **factory)
    weight[0] = 0
    logprob, dhidden, _ = grad(torch.zeros(1, 16, **factory), weight)
    _near(logprob, -math.log(n))
    _near(dhidden, -(n - 1) / n)


CHECKS = [check_norms, check_attention, check_decode_attention, check_token_logprob]
