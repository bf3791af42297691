"""SwiGLU in Triton, interpreted, by the rule of `numerics.judge`, and the promises beside it.

Yardstick in the same dtype: F.silu(gate) * up.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import draw, judge

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt.kernels import swiglu as kernels
from llama2rt.ops import reference

pytestmark = [
    pytest.mark.usefixtures("interpreted", "poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # 1 / (1 + inf) is meant
]


@pytest.mark.parametrize("kind", ["normal", "small", "tail", "offset"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (113, 65)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_numerics(shape, kind, dtype, seed):
    gate, up = draw(shape, dtype, kind, seed), draw(shape, dtype, kind, seed + 1)
    dy = draw(shape, dtype, "normal", seed + 2)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    theirs = F.silu(leaves[0]) * leaves[1]
    wide = [x.double() for x in (dy, gate, up)]
    judge("y", kernels.swiglu(gate, up), reference.swiglu(*wide[1:]), theirs.detach())
    for name, *three in zip(
        ("dgate", "dup"),
        kernels.swiglu_backward(dy, gate, up),
        reference.swiglu_backward(*wide),
        torch.autograd.grad(theirs, leaves, dy),
        strict=True,
    ):
        judge(name, *three, gradient=True)


def test_gates_far_from_zero(dtype):
    gate = torch.tensor([[-300.0, -60.0, 60.0, 300.0]], dtype=dtype)
    one = torch.ones_like(gate)
    dgate, dup = kernels.swiglu_backward(one, gate, one)
    for ours, limit in (
        (kernels.swiglu(gate, one), gate.clamp_min(0)),
        (dup, gate.clamp_min(0)),
        (dgate, (gate > 0).to(dtype)),
    ):
        torch.testing.assert_close(ours, limit, rtol=0, atol=1e-20)


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
    for ours, expected in zip(
        kernels.swiglu_backward(x, other, x),
        kernels.swiglu_backward(*dense, dense[0]),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    assert torch.equal(fused, copy), "an input was changed"


def test_no_rows(dtype):
    x = torch.empty(0, 64, dtype=dtype)
    assert all(
        y.shape == (0, 64) for y in (kernels.swiglu(x, x), *kernels.swiglu_backward(x, x, x))
    )
