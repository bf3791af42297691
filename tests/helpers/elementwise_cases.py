"""RMSNorm, SwiGLU and rotary embedding judged by `numerics`, whatever runs them.

Yardsticks in the same dtype: LLaMA's own RMSNorm (fp32 inside, cast, times weight); F.silu(gate) *
up; Hugging Face's rotation with tables in the storage dtype. `run` has the functions of a backend
as attributes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from numerics import draw, judge, judge_gradients, leaves_of, same_bits, wide
from strides import columns_first, heads_first, one_row
from torch import Tensor

from llama2rt.ops import reference

EPS = 1e-5
KINDS = ["normal", "small", "tail", "offset"]


def shape_name(shape: tuple[int, int]) -> str:
    """The name of a case of so many rows and columns."""
    return f"{shape[0]}x{shape[1]}"


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


def check_rms_norm(
    run: Any, shape: tuple[int, int], kind: str, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both ops, forward and backward, with a gradient through the residual and without.

    Returns (y, rstd) of the same rows by add_rms_norm and by rms_norm: their bits may differ.
    """
    x, residual, dy, dsummed = (
        draw(shape, dtype, kind if i < 2 else "normal", seed + i).to(device) for i in range(4)
    )
    weight = draw(shape[1:], dtype, "normal", seed + 4).to(device)
    y, summed, rstd = run.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    alone, alone_rstd = run.rms_norm(summed, weight, EPS)
    exact, exact_rstd = reference.rms_norm(*wide(summed, weight), EPS)
    leaves = leaves_of(summed, weight)
    theirs = llama_rms_norm(*leaves)
    for name, ours, our_rstd in (("add_rms_norm", y, rstd), ("rms_norm", alone, alone_rstd)):
        judge(name, ours, exact, theirs.detach())
        torch.testing.assert_close(our_rstd.double(), exact_rstd, rtol=2e-6, atol=0)

    saved, exact_saved = (summed, weight, rstd), (*wide(summed, weight), exact_rstd)
    dx, dweight = torch.autograd.grad(theirs, leaves, dy)
    without = reference.rms_norm_backward(dy.double(), *exact_saved)
    both = reference.add_rms_norm_backward(*wide(dy, dsummed), *exact_saved)
    judge_gradients("dx dweight", run.rms_norm_backward(dy, *saved), without, (dx, dweight))
    for extra, expected, yardstick in ((None, without, dx), (dsummed, both, dx + dsummed)):
        ours = run.add_rms_norm_backward(dy, extra, *saved)
        judge_gradients("dx dweight", ours, expected, (yardstick, dweight))
        again = run.add_rms_norm_backward(dy, extra, *saved)
        assert same_bits(ours, again), "not the same bits again"
    return (y, rstd), (alone, alone_rstd)


def check_swiglu(
    run: Any, shape: tuple[int, int], kind: str, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> None:
    """Forward and backward."""
    gate, up = (draw(shape, dtype, kind, seed + i).to(device) for i in range(2))
    dy = draw(shape, dtype, "normal", seed + 2).to(device)
    leaves = leaves_of(gate, up)
    theirs = F.silu(leaves[0]) * leaves[1]
    judge("y", run.swiglu(gate, up), reference.swiglu(*wide(gate, up)), theirs.detach())
    judge_gradients(
        "dgate dup",
        run.swiglu_backward(dy, gate, up),
        reference.swiglu_backward(*wide(dy, gate, up)),
        torch.autograd.grad(theirs, leaves, dy),
    )


def rope_tables(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, dim / 2], fp32."""
    angle = torch.outer(torch.arange(rows), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    return angle.cos(), angle.sin()


def hugging_face_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    c, s = (torch.cat((t, t), -1)[positions][:, None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((-second, first), -1) * s


def check_rope(
    run: Any,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int,
    *,
    kinds: tuple[str, str] = ("normal", "normal"),
    index: torch.dtype = torch.int32,
    rows: int = 300,
    device: str = "cpu",
) -> None:
    """Forward and backward; `kinds` of q and k, tables of so many `rows`."""
    q = draw((tokens, heads, dim), dtype, kinds[0], seed).to(device)
    k = draw((tokens, kv_heads, dim), dtype, kinds[1], seed + 1).to(device)
    cos, sin = (table.to(device) for table in rope_tables(rows, dim))
    positions = torch.randint(rows, (tokens,), dtype=index).to(device)
    for function, exact, turned in (
        (run.rope, reference.rope, sin),
        (run.rope_backward, reference.rope_backward, -sin),
    ):
        ours = function(q, k, cos, sin, positions)
        expected = exact(*wide(q, k, cos, sin), positions)
        for name, x, *two in zip("qk", (q, k), ours, expected, strict=True):
            judge(name, *two, hugging_face_rope(x, cos, turned, positions))


ROPE_STRIDES = {
    "fused": lambda x: x.view(5, 144)[:, 3:135].view(5, 11, 12),
    "heads first": heads_first,
    "columns first": columns_first,
    "one token": one_row,
}


def check_rope_strides(run: Any, strides: str, dtype: torch.dtype) -> None:
    """q and k are parts of one tensor with ROPE_STRIDES[strides]; it is left alone."""
    x = ROPE_STRIDES[strides](torch.randn(5, 6, 24).to(dtype))
    q, k = x[:, :4], x[:, 4:]
    cos, sin = rope_tables(9, x.shape[2])
    positions, copy = torch.tensor([8, 0, 3, 3, 1]), x.clone()
    for function in (run.rope, run.rope_backward):
        dense = function(q.contiguous(), k.contiguous(), cos, sin, positions)
        assert same_bits(function(q, k, cos, sin, positions), dense)
    assert torch.equal(x, copy), "an input was changed"


def check_rope_outside_the_tables(run: Any, position: int) -> None:
    """One of three tokens lies at `position`, where tables of three rows have none."""
    q, positions = torch.ones(3, 2, 8), torch.tensor([0, position, 2])
    rotated, _ = run.rope(q, q, *rope_tables(3, 8), positions)
    assert rotated[1].isnan().all() and torch.isfinite(rotated[[0, 2]]).all()


def check_rope_of_nothing(run: Any, dtype: torch.dtype) -> None:
    """No tokens, and no key heads."""
    for tokens, kv_heads in ((0, 2), (2, 0)):
        q, positions = torch.ones(tokens, 2, 8, dtype=dtype), torch.zeros(tokens).int()
        ours = run.rope(q, q[:, :kv_heads], *rope_tables(3, 8), positions)
        assert torch.equal(ours[0], q) and ours[1].shape == (tokens, kv_heads, 8)


def check_rms_norm_of_no_rows(run: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    x, weight = torch.empty(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    x, weight = x.to(device), weight.to(device)
    y, summed, rstd = run.add_rms_norm(x, x, weight, EPS)
    dx, dweight = run.add_rms_norm_backward(x, x, x, weight, rstd)
    assert y.shape == summed.shape == dx.shape == (0, 64) and not dweight.any()


def check_swiglu_of_no_rows(run: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    x = torch.empty(0, 64, dtype=dtype, device=device)
    assert all(y.shape == (0, 64) for y in (run.swiglu(x, x), *run.swiglu_backward(x, x, x)))


def check_swiglu_far_from_zero(run: Any, dtype: torch.dtype) -> None:
    """Gates where the exponential is 0 or infinite."""
    gate = torch.tensor([[-300.0, -60.0, 60.0, 300.0]], dtype=dtype)
    one = torch.ones_like(gate)
    dgate, dup = run.swiglu_backward(one, gate, one)
    for ours, limit in (
        (run.swiglu(gate, one), gate.clamp_min(0)),
        (dup, gate.clamp_min(0)),
        (dgate, (gate > 0).to(dtype)),
    ):
        torch.testing.assert_close(ours, limit, rtol=0, atol=1e-20)
