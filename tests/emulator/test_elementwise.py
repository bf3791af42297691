"""RMSNorm in CUDA, emulated, by the rule of `numerics.judge`, and the promises beside it.

Yardstick in the same dtype: LLaMA's own formulation.
"""

import pytest
import torch
from numerics import draw, judge

from llama2rt import ops
from llama2rt.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5
# One warp half empty, odd columns (single elements), several warps, more rows than blocks.
SHAPES = [(1, 7), (3, 64), (113, 24), (5, 1040)]


def llama_rms_norm(x, weight):
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


@pytest.mark.parametrize("kind", ["normal", "small", "tail", "offset"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_rms_norm(emulated, shape, kind, dtype, seed):
    x, dy = draw(shape, dtype, kind, seed), draw(shape, dtype, "normal", seed + 1)
    weight = draw(shape[1:], dtype, "normal", seed + 2)
    y, rstd = emulated.rms_norm(x, weight, EPS)
    exact, exact_rstd = reference.rms_norm(x.double(), weight.double(), EPS)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = llama_rms_norm(*leaves)
    judge("y", y, exact, theirs.detach())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)
    ours = emulated.rms_norm_backward(dy, x, weight, rstd)
    expected = reference.rms_norm_backward(dy.double(), x.double(), weight.double(), exact_rstd)
    yardstick = torch.autograd.grad(theirs, leaves, dy)
    for name, *three in zip(("dx", "dweight"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)


def test_through_the_ops(module):
    x, weight = torch.randn(3, 5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    gradients = []
    for name in ("emulated", "reference"):
        with ops.use(name):
            out = ops.rms_norm(x, weight, EPS)
        gradients.append(torch.autograd.grad(out.square().sum(), (x, weight)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
