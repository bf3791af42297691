"""RMSNorm of `_cuda` by the rule of `numerics.judge`, and the promises that are not numbers.

Yardstick in the same dtype: LLaMA's own formulation on the same GPU. Not yet run on a GPU.
"""

import pytest
import torch
from numerics import draw, judge

from llama2rt import ops
from llama2rt.ops import reference

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One warp, one and several packs a thread, odd (single elements), longer than a block can hold.
SHAPES = [(1, 7), (3, 64), (113, 203), (257, 1024), (1024, 4096), (67, 8192), (5, 5120), (3, 40000)]


def llama_rms_norm(x, weight):
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


@pytest.fixture(autouse=True)
def poisoned(cuda):
    """torch.empty returns NaN, so an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["normal", "small", "tail", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_numerics(cuda, shape, dtype, kind, seed):
    x, dy = draw(shape, dtype, kind, seed).cuda(), draw(shape, dtype, "normal", seed + 1).cuda()
    weight = draw(shape[1:], dtype, "normal", seed + 2).cuda()
    y, rstd = cuda.rms_norm(x, weight, EPS)
    exact, exact_rstd = reference.rms_norm(x.double(), weight.double(), EPS)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = llama_rms_norm(*leaves)
    judge("y", y, exact, theirs.detach())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)
    ours = cuda.rms_norm_backward(dy, x, weight, rstd)
    expected = reference.rms_norm_backward(dy.double(), x.double(), weight.double(), exact_rstd)
    yardstick = torch.autograd.grad(theirs, leaves, dy)
    for name, *three in zip(("dx", "dweight"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)
    for first, second in zip(ours, cuda.rms_norm_backward(dy, x, weight, rstd), strict=True):
        assert torch.equal(first, second), "not the same bits again"


@pytest.mark.parametrize("strides", ["rows apart", "off alignment", "columns first", "repeated"])
def test_any_strides(cuda, strides):
    x = torch.randn(65, 256, device="cuda").bfloat16()
    x = {
        "rows apart": torch.cat((x, x), -1)[:, :256],
        "off alignment": torch.cat((x[:, :1], x), -1)[:, 1:],
        "columns first": x.t().contiguous().t(),
        "repeated": x[:1, :1].expand_as(x),
    }[strides]
    weight = torch.randn(256, device="cuda").bfloat16()
    dense = x.contiguous()
    y, rstd = cuda.rms_norm(x, weight, EPS)
    assert torch.equal(y, cuda.rms_norm(dense, weight, EPS)[0])
    for first, second in zip(
        cuda.rms_norm_backward(x, x, weight, rstd),
        cuda.rms_norm_backward(dense, dense, weight, rstd),
        strict=True,
    ):
        # Unaligned rows are read element by element, so their sums are added in another order.
        torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)


def test_no_rows(cuda):
    x, weight = torch.empty(0, 64, device="cuda"), torch.ones(64, device="cuda")
    y, rstd = cuda.rms_norm(x, weight, EPS)
    dx, dweight = cuda.rms_norm_backward(x, x, weight, rstd)
    assert y.shape == dx.shape == (0, 64) and not dweight.any()


def test_offsets_beyond_32_bits(cuda):
    """2^31 elements and some more: 8 GiB in and out."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory is free")
    x = torch.randn(1, 8192, device="cuda").bfloat16().expand(2**18 + 3, -1).contiguous()
    weight = torch.randn(8192, device="cuda").bfloat16()
    y, rstd = cuda.rms_norm(x, weight, EPS)
    assert torch.equal(y[-1], y[0]) and torch.equal(rstd[-1], rstd[0])
    dx, _ = cuda.rms_norm_backward(y, x, weight, rstd)
    assert torch.equal(dx[-1], dx[0])


def test_runs_on_the_current_stream(cuda):
    x, weight = torch.randn(4096, 4096, device="cuda"), torch.ones(4096, device="cuda")
    expected = cuda.rms_norm(x, weight, EPS)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y = cuda.rms_norm(late, weight, EPS)[0]
    stream.synchronize()
    assert torch.equal(y, expected)


def test_runs_where_it_is_asked_for(cuda):
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    weight = torch.randn(64, device="cuda", requires_grad=True)
    with ops.use("cuda"):
        ops.rms_norm(x, weight, EPS).sum().backward()
    ours = x.grad.clone()
    x.grad = None
    with ops.use("reference"):
        ops.rms_norm(x, weight, EPS).sum().backward()
    torch.testing.assert_close(ours, x.grad)
