"""RMSNorm, SwiGLU and rotary embedding in Triton and CUDA C++, on a GPU, by the rule of `numerics`.

Yardsticks in the same dtype, on the same GPU: LLaMA's own RMSNorm, F.silu(gate) * up, and Hugging
Face's rotary embedding. Not yet run on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import draw, judge

from llama2rt import ops
from llama2rt.ops import reference

EPS = 1e-5
KINDS = ["normal", "small", "tail", "offset"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Short rows, odd ones, those of 7B and 70B, and longer than a program holds.
SHAPES = [(1, 7), (113, 24), (257, 1040), (1024, 4096), (67, 8192), (5, 5120), (3, 40000)]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture
def kernels(request, backend):
    """The functions of the backend."""
    return request.getfixturevalue(backend)


@pytest.fixture(autouse=True)
def poisoned(kernels):
    """torch.empty returns NaN, so an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request):
    return request.param


def wide(*tensors):
    return [x.double() for x in tensors]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def llama_rms_norm(x, weight):
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_rms_norm(kernels, shape, kind, dtype, seed):
    x, residual, dy, dsummed = (
        draw(shape, dtype, kind if i < 2 else "normal", seed + i).cuda() for i in range(4)
    )
    weight = draw(shape[1:], dtype, "normal", seed + 4).cuda()
    y, summed, rstd = kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    exact, exact_rstd = reference.rms_norm(*wide(summed, weight), EPS)
    leaves = [summed.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = llama_rms_norm(*leaves)
    judge("y", y, exact, theirs.detach())
    judge("y alone", kernels.rms_norm(summed, weight, EPS)[0], exact, theirs.detach())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)
    dx, dweight = torch.autograd.grad(theirs, leaves, dy)
    for extra in (None, dsummed):
        arguments = (dy, extra, summed, weight, rstd)
        ours = kernels.add_rms_norm_backward(*arguments)
        expected = reference.add_rms_norm_backward(
            dy.double(),
            None if extra is None else extra.double(),
            *wide(summed, weight),
            exact_rstd,
        )
        judge("dx", ours[0], expected[0], dx if extra is None else dx + extra, gradient=True)
        judge("dweight", ours[1], expected[1], dweight, gradient=True)
        assert same_bits(ours, kernels.add_rms_norm_backward(*arguments)), "not the same bits again"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 11008)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_swiglu(kernels, shape, kind, dtype, seed):
    gate, up, dy = (draw(shape, dtype, kind, seed + i).cuda() for i in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    theirs = F.silu(leaves[0]) * leaves[1]
    judge("y", kernels.swiglu(gate, up), reference.swiglu(*wide(gate, up)), theirs.detach())
    for name, *three in zip(
        ("dgate", "dup"),
        kernels.swiglu_backward(dy, gate, up),
        reference.swiglu_backward(*wide(dy, gate, up)),
        torch.autograd.grad(theirs, leaves, dy),
        strict=True,
    ):
        judge(name, *three, gradient=True)


def hugging_face(x, cos, sin, positions):
    c, s = (torch.cat((t, t), -1)[positions][:, None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((-second, first), -1) * s


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 8, 8, 128), (1024, 32, 32, 128), (203, 64, 8, 128), (113, 52, 52, 48), (2, 2, 1, 256)],
)
def test_rope(kernels, tokens, heads, kv_heads, dim, index, dtype, seed):
    q = draw((tokens, heads, dim), dtype, "tail", seed).cuda()
    k = draw((tokens, kv_heads, dim), dtype, "offset", seed + 1).cuda()
    angle = torch.outer(torch.arange(4096), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = angle.cos().cuda(), angle.sin().cuda()
    positions = torch.randint(4096, (tokens,), dtype=index).cuda()
    for function, exact, signed in (
        (kernels.rope, reference.rope, sin),
        (kernels.rope_backward, reference.rope_backward, -sin),
    ):
        ours = function(q, k, cos, sin, positions)
        expected = exact(*wide(q, k, cos, sin), positions)
        for name, x, *two in zip("qk", (q, k), ours, expected, strict=True):
            judge(name, *two, hugging_face(x, cos, signed, positions))


def test_a_position_outside_the_tables_gives_nan(kernels):
    q, table = torch.ones(3, 2, 8, device="cuda"), torch.ones(3, 4, device="cuda")
    rotated, _ = kernels.rope(q, q, table, table, torch.tensor([0, 2**40, 2], device="cuda"))
    assert rotated[1].isnan().all() and torch.isfinite(rotated[[0, 2]]).all()


def test_halves_of_a_fused_projection_and_repeated_gradients(kernels):
    fused = torch.randn(65, 512, device="cuda").bfloat16()
    gate, up = fused.chunk(2, -1)
    dy = fused[:1, :1].expand_as(gate)
    dense = [x.contiguous() for x in (dy, gate, up)]
    assert torch.equal(kernels.swiglu(gate, up), kernels.swiglu(*dense[1:]))
    assert same_bits(kernels.swiglu_backward(dy, gate, up), kernels.swiglu_backward(*dense))
    weight, rstd = torch.randn(256, device="cuda").bfloat16(), torch.rand(65, device="cuda")
    assert same_bits(
        kernels.add_rms_norm_backward(dy, gate, up, weight, rstd),
        kernels.add_rms_norm_backward(*dense, weight, rstd),
    )


def test_offsets_beyond_32_bits(kernels):
    """2^31 elements and some more, of which the last row must equal the first."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("less than 30 GiB of GPU memory is free")
    x = torch.randn(1, 8192, device="cuda").bfloat16().expand(2**18 + 3, -1).contiguous()
    weight = torch.randn(8192, device="cuda").bfloat16()
    y, rstd = kernels.rms_norm(x, weight, EPS)
    assert torch.equal(y[-1], y[0]) and torch.equal(rstd[-1], rstd[0])
    dx, _ = kernels.rms_norm_backward(y, x, weight, rstd)
    assert torch.equal(dx[-1], dx[0])
    del dx, y
    y = kernels.swiglu(x, x)
    assert torch.equal(y[-1], y[0])
    del y
    positions = torch.ones(len(x), dtype=torch.int32, device="cuda")
    heads, table = x.view(-1, 64, 128), torch.rand(2, 64, device="cuda")
    rotated, _ = kernels.rope(heads, heads[:, :1], table, table, positions)
    assert torch.equal(rotated[-1], rotated[0])


def test_runs_on_the_current_stream(kernels):
    x, weight = torch.randn(4096, 4096, device="cuda"), torch.ones(4096, device="cuda")
    expected = kernels.rms_norm(x, weight, EPS)[0]
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y = kernels.rms_norm(late, weight, EPS)[0]
    stream.synchronize()
    assert torch.equal(y, expected)


def test_no_rows(kernels):
    x, weight = torch.empty(0, 64, device="cuda"), torch.ones(64, device="cuda")
    y, summed, rstd = kernels.add_rms_norm(x, x, weight, EPS)
    dx, dweight = kernels.add_rms_norm_backward(x, x, x, weight, rstd)
    assert y.shape == summed.shape == dx.shape == (0, 64) and not dweight.any()
    assert kernels.swiglu(x, x).shape == (0, 64)


def test_training_through_the_ops(kernels, backend):
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    weight = torch.randn(64, device="cuda", requires_grad=True)
    gradients = []
    for name in (backend, "reference"):
        with ops.use(name):
            y, summed = ops.add_rms_norm(x, x, weight, EPS)
            out = ops.swiglu(ops.rms_norm(y, weight, EPS), summed).square().sum()
        gradients.append(torch.autograd.grad(out, (x, weight)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
