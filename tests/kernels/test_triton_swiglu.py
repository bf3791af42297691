"""SwiGLU in Triton, interpreted, by the rule of `numerics.judge`, and the promises beside it.

The yardstick and the inputs are in `elementwise_cases`.
"""

import pytest
import torch
from elementwise_cases import (
    KINDS,
    check_swiglu,
    check_swiglu_far_from_zero,
    check_swiglu_of_no_rows,
    shape_name,
)
from numerics import same_bits

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt.kernels import swiglu as kernels

pytestmark = [
    pytest.mark.usefixtures("interpreted", "poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # 1 / (1 + inf) is meant
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (113, 65)], ids=shape_name)
def test_numerics(shape, kind, dtype, seed):
    check_swiglu(kernels, shape, kind, dtype, seed)


def test_gates_far_from_zero(dtype):
    check_swiglu_far_from_zero(kernels, dtype)


@pytest.mark.parametrize("strides", ["fused", "columns first", "one row", "one value"])
def test_any_strides(strides, dtype):
    fused = torch.randn(9, 2 * 75).to(dtype)
    x, other = {
        "fused": lambda: fused.chunk(2, -1),
        "columns first": lambda: fused.view(75, 18).t().chunk(2),
        "one row": lambda: (fused[:1, :75].expand(9, -1), fused[:, :75]),
        "one value": lambda: (fused[:1, :1].expand(9, 75), fused[:, :75]),
    }[strides]()
    dense = [x.contiguous(), other.contiguous()]
    copy = fused.clone()
    assert torch.equal(kernels.swiglu(x, other), kernels.swiglu(*dense))
    assert same_bits(
        kernels.swiglu_backward(x, other, x), kernels.swiglu_backward(*dense, dense[0])
    )
    assert torch.equal(fused, copy), "an input was changed"


def test_offsets_beyond_32_bits(far):
    near = torch.randn(4, 64).bfloat16()
    x = far(near)
    assert torch.equal(kernels.swiglu(x, x), kernels.swiglu(near, near))
    assert same_bits(kernels.swiglu_backward(x, x, x), kernels.swiglu_backward(near, near, near))


def test_no_rows(dtype):
    check_swiglu_of_no_rows(kernels, dtype)
