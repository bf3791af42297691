"""RMSNorm in Triton, interpreted, by the rule of `numerics.judge`, and the promises beside it.

The yardstick and the inputs are in `elementwise_cases`.
"""

import pytest
import torch
from elementwise_cases import EPS, KINDS, check_rms_norm, check_rms_norm_of_no_rows, shape_name
from numerics import same_bits
from strides import STRIDES

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt import ops
from llama2rt.kernels import rms_norm as kernels

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")

# One short row, a ragged last tile of many, blocks of a few rows half empty.
SHAPES = [(1, 7), (113, 24), (5, 1040)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_numerics(shape, kind, dtype, seed):
    added, alone = check_rms_norm(kernels, shape, kind, dtype, seed)
    assert same_bits(added, alone)


@pytest.mark.parametrize("kind", ["normal", "tail"])
def test_rows_too_long_to_hold(kind, dtype, seed, monkeypatch):
    short = {80: kernels.Launch(tile=128, per_thread=2, longest=128, warps=2)}
    monkeypatch.setattr(kernels, "FORWARD", short)
    monkeypatch.setattr(kernels, "BACKWARD", short)
    monkeypatch.setattr(kernels, "DWEIGHT_ROWS", 1)  # fewer than there are programs
    added, alone = check_rms_norm(kernels, (3, 150), kind, dtype, seed)
    assert same_bits(added, alone)


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides, dtype):
    x = STRIDES[strides](torch.randn(9, 75).to(dtype))
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


@pytest.mark.parametrize("longest", [512, 32])
def test_offsets_beyond_32_bits(longest, far, monkeypatch):
    short = {80: kernels.Launch(tile=128, per_thread=2, longest=longest, warps=2)}
    monkeypatch.setattr(kernels, "FORWARD", short)
    monkeypatch.setattr(kernels, "BACKWARD", short)
    near = torch.randn(4, 64).bfloat16()
    x, weight, rstd = far(near), torch.randn(64).bfloat16(), torch.rand(4)
    assert same_bits(
        kernels.add_rms_norm(x, x, weight, EPS), kernels.add_rms_norm(near, near, weight, EPS)
    )
    assert same_bits(
        kernels.add_rms_norm_backward(x, x, x, weight, rstd),
        kernels.add_rms_norm_backward(near, near, near, weight, rstd),
    )


def test_no_rows(dtype):
    check_rms_norm_of_no_rows(kernels, dtype)


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
