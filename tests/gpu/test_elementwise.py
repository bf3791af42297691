"""RMSNorm, SwiGLU and rotary embedding in Triton and CUDA C++, on a GPU, by the rule of `numerics`.

The yardsticks, computed on the same GPU, and the inputs are in `elementwise_cases`. Not yet run on
a GPU.
"""

import pytest
import torch
from elementwise_cases import (
    EPS,
    KINDS,
    check_rms_norm,
    check_rms_norm_of_no_rows,
    check_rope,
    check_swiglu,
    check_swiglu_of_no_rows,
    shape_name,
)
from numerics import same_bits
from strides import one_value

from llama2rt import ops

# Short rows, odd ones, those of 7B and 70B, and longer than a program holds.
SHAPES = [(1, 7), (113, 24), (257, 1040), (1024, 4096), (67, 8192), (5, 5120), (3, 40000)]


@pytest.fixture
def kernels(request, backend, poisoned):
    """The functions of each backend in turn."""
    return request.getfixturevalue(backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_rms_norm(kernels, shape, kind, dtype, seed):
    check_rms_norm(kernels, shape, kind, dtype, seed, "cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 11008)], ids=shape_name)
def test_swiglu(kernels, shape, kind, dtype, seed):
    check_swiglu(kernels, shape, kind, dtype, seed, "cuda")


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 8, 8, 128), (1024, 32, 32, 128), (203, 64, 8, 128), (113, 52, 52, 48), (2, 2, 1, 256)],
)
def test_rope(kernels, tokens, heads, kv_heads, dim, index, dtype, seed):
    check_rope(
        *(kernels, tokens, heads, kv_heads, dim, dtype, seed),
        kinds=("tail", "offset"),
        index=index,
        rows=4096,
        device="cuda",
    )


def test_a_position_outside_the_tables_gives_nan(kernels):
    q, table = torch.ones(3, 2, 8, device="cuda"), torch.ones(3, 4, device="cuda")
    rotated, _ = kernels.rope(q, q, table, table, torch.tensor([0, 2**40, 2], device="cuda"))
    assert rotated[1].isnan().all() and torch.isfinite(rotated[[0, 2]]).all()


def test_halves_of_a_fused_projection_and_repeated_gradients(kernels):
    fused = torch.randn(65, 512, device="cuda").bfloat16()
    gate, up = fused.chunk(2, -1)
    dy = one_value(gate)
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
    check_rms_norm_of_no_rows(kernels, torch.float32, "cuda")
    check_swiglu_of_no_rows(kernels, torch.float32, "cuda")


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
