"""RMSNorm in Triton, interpreted, by the rule of `numerics.judge`, and the promises beside it.

Yardstick in the same dtype: LLaMA's own formulation.
"""

import pytest
import torch
from numerics import draw, judge

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt import ops
from llama2rt.kernels import rms_norm as kernels
from llama2rt.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

EPS = 1e-5
# One short row, a ragged last tile of many, blocks of a few rows half empty.
SHAPES = [(1, 7), (113, 24), (5, 1040)]


def llama_rms_norm(x, weight):
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


def wide(*tensors):
    return [t.double() for t in tensors]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check(shape, kind, dtype, seed):
    """Both ops, forward and backward, the residual's gradient present and absent."""
    x, residual = draw(shape, dtype, kind, seed), draw(shape, dtype, kind, seed + 1)
    dy, dsummed = draw(shape, dtype, "normal", seed + 2), draw(shape, dtype, "normal", seed + 3)
    weight = draw(shape[1:], dtype, "normal", seed + 4)
    y, summed, rstd = kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert same_bits(kernels.rms_norm(summed, weight, EPS), (y, rstd))

    exact, exact_rstd = reference.rms_norm(*wide(summed, weight), EPS)
    leaves = [summed.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = llama_rms_norm(*leaves)
    judge("y", y, exact, theirs.detach())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)

    dx, dweight = torch.autograd.grad(theirs, leaves, dy)
    for ours, extra in (
        (kernels.rms_norm_backward(dy, summed, weight, rstd), None),
        (kernels.add_rms_norm_backward(dy, dsummed, summed, weight, rstd), dsummed),
    ):
        expected = reference.add_rms_norm_backward(
            dy.double(),
            None if extra is None else extra.double(),
            *wide(summed, weight),
            exact_rstd,
        )
        judge("dx", ours[0], expected[0], dx if extra is None else dx + extra, gradient=True)
        judge("dweight", ours[1], expected[1], dweight, gradient=True)


@pytest.mark.parametrize("kind", ["normal", "small", "tail", "offset"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_numerics(shape, kind, dtype, seed):
    check(shape, kind, dtype, seed)


@pytest.mark.parametrize("kind", ["normal", "tail"])
def test_rows_too_long_to_hold(kind, dtype, seed, monkeypatch):
    short = {80: kernels.Launch(tile=128, per_thread=2, longest=128, warps=2)}
    monkeypatch.setattr(kernels, "FORWARD", short)
    monkeypatch.setattr(kernels, "BACKWARD", short)
    check((3, 150), kind, dtype, seed)


@pytest.mark.parametrize("strides", ["rows apart", "columns first", "one row", "one value"])
def test_any_strides(strides, dtype):
    x = torch.randn(9, 75).to(dtype)
    x = {
        "rows apart": torch.cat((x, x), -1)[:, :75],
        "columns first": x.t().contiguous().t(),
        "one row": x[:1].expand_as(x),
        "one value": x[:1, :1].expand_as(x),
    }[strides]
    weight, rstd = torch.randn(75).to(dtype), torch.rand(9)
    dense, copy = x.contiguous(), x.clone()
    assert same_bits(
        kernels.add_rms_norm(x, x, weight, EPS), kernels.add_rms_norm(dense, dense, weight, EPS)
    )
    assert same_bits(
        kernels.add_rms_norm_backward(x, x, x, weight, rstd),
        kernels.add_rms_norm_backward(dense, dense, dense, weight, rstd),
    )
    assert torch.equal(x, copy), "an input was changed"


def test_no_rows(dtype):
    x, weight = torch.empty(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    y, summed, rstd = kernels.add_rms_norm(x, x, weight, EPS)
    dx, dweight = kernels.add_rms_norm_backward(x, x, x, weight, rstd)
    assert y.shape == summed.shape == dx.shape == (0, 64) and not dweight.any()


def test_through_the_ops():
    x, residual, weight = (
        torch.randn(*s, requires_grad=True) for s in ((3, 5, 24), (3, 5, 24), (24,))
    )
    gradients = []
    for name in ("triton", "reference"):
        with ops.use(name):
            y, summed = ops.add_rms_norm(x, residual, weight, EPS)
            out = ops.rms_norm(y, weight, EPS) + summed
        gradients.append(torch.autograd.grad(out.square().sum(), (x, residual, weight)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
