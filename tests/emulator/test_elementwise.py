"""RMSNorm, SwiGLU and rotary embedding in CUDA, emulated, by the rule of `numerics.judge`, and the
promises beside it.

The yardsticks and the inputs are in `elementwise_cases`.
"""

import elementwise_cases
import pytest
import torch
from elementwise_cases import (
    EPS,
    KINDS,
    ROPE_STRIDES,
    check_rms_norm,
    check_rope,
    check_swiglu,
    rope_tables,
    shape_name,
)
from numerics import same_bits
from strides import STRIDES

from llama2rt import ops
from llama2rt.ops import backend

pytestmark = pytest.mark.usefixtures("poisoned")

# One warp half empty, odd columns (single elements), several warps and packs, more rows than
# blocks, and rows longer than a block can hold.
NORM_SHAPES = [(1, 7), (3, 64), (113, 24), (5, 1040), (9, 203), (4, 8200), (3, 2051)]
GATE_SHAPES = [(1, 1), (3, 7), (113, 65), (5, 256), (2, 8448)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=shape_name)
def test_rms_norm(emulated, shape, kind, dtype, seed):
    added, alone = check_rms_norm(emulated, shape, kind, dtype, seed)
    assert same_bits(added, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", GATE_SHAPES, ids=shape_name)
def test_swiglu(emulated, shape, kind, dtype, seed):
    check_swiglu(emulated, shape, kind, dtype, seed)


def test_gates_far_from_zero(emulated, dtype):
    elementwise_cases.check_swiglu_far_from_zero(emulated, dtype)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["normal", "tail", "offset"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [
        *[(1, 8, 8, 128), (113, 8, 2, 16), (7, 52, 1, 48), (3, 1, 3, 2), (2, 2, 1, 256)],
        *[(3, 1, 1, 298), (5, 3, 0, 32)],
    ],
)
def test_rope(emulated, tokens, heads, kv_heads, dim, kind, index, dtype, seed):
    check_rope(
        *(emulated, tokens, heads, kv_heads, dim, dtype, seed), kinds=(kind, kind), index=index
    )


@pytest.mark.parametrize("position", [-1, 3, 2**33])
def test_a_position_outside_the_tables_gives_nan_for_its_token_alone(emulated, position):
    elementwise_cases.check_rope_outside_the_tables(emulated, position)


@pytest.mark.parametrize("columns", [75, 136])
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_of_rows(emulated, strides, columns, dtype):
    x = STRIDES[strides](torch.randn(9, columns).to(dtype))
    weight, rstd = torch.randn(columns).to(dtype), torch.rand(9)
    dense, copy = x.contiguous(), x.clone()
    for call in (
        lambda x: (emulated.swiglu(x, x),),
        lambda x: emulated.swiglu_backward(x, x, x),
        lambda x: emulated.add_rms_norm(x, x, weight, EPS),
        lambda x: emulated.add_rms_norm_backward(x, x, x, weight, rstd),
    ):
        for ours, expected in zip(call(x), call(dense), strict=True):
            # Unaligned rows are read element by element: sums are added in another order.
            torch.testing.assert_close(ours, expected)
    assert torch.equal(x, copy), "an input was changed"


@pytest.mark.parametrize("strides", ROPE_STRIDES)
def test_any_strides_of_heads(emulated, strides, dtype):
    elementwise_cases.check_rope_strides(emulated, strides, dtype)


def test_offsets_beyond_32_bits(emulated, far):
    near = torch.randn(4, 64).bfloat16()
    x, weight, rstd = far(near), torch.randn(64).bfloat16(), torch.rand(4)
    heads, near_heads = far(near.view(4, 4, 16)), near.view(4, 4, 16)
    rest = (*rope_tables(9, 16), torch.tensor([8, 0, 3, 3]))
    for call in (
        lambda x, _: emulated.add_rms_norm(x, x, weight, EPS),
        lambda x, _: emulated.add_rms_norm_backward(x, x, x, weight, rstd),
        lambda x, _: (emulated.swiglu(x, x),),
        lambda x, _: emulated.swiglu_backward(x, x, x),
        lambda _, h: emulated.rope(h, h, *rest),
    ):
        assert same_bits(call(x, heads), call(near, near_heads))


def test_repeats_have_the_same_bits(emulated, module, dtype):
    """Whatever the order of threads and blocks."""
    x, weight, rstd = torch.randn(40, 96).to(dtype), torch.randn(96).to(dtype), torch.rand(40)
    results = []
    for seed in range(4):
        module.set_seed(seed)
        results.append(emulated.add_rms_norm_backward(x, x, x, weight, rstd))
    assert all(same_bits(result, results[0]) for result in results)


def test_nothing_to_do(emulated, dtype):
    elementwise_cases.check_rms_norm_of_no_rows(emulated, dtype)
    elementwise_cases.check_swiglu_of_no_rows(emulated, dtype)
    elementwise_cases.check_rope_of_nothing(emulated, dtype)


def test_through_the_ops(emulated, module):
    x, residual, weight = (
        torch.randn(*s, requires_grad=True) for s in ((3, 5, 24), (3, 5, 24), (24,))
    )
    cos, sin = rope_tables(15, 8)
    gradients = []
    for name in ("emulated", "reference"):
        with ops.use(name):
            y, summed = ops.add_rms_norm(x, residual, weight, EPS)
            out = ops.swiglu(ops.rms_norm(y, weight, EPS), summed).view(15, 3, 8)
            q, k = ops.rope(out, out[:, :1], cos, sin, torch.arange(15))
        loss = q.square().sum() + k.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, (x, residual, weight)))
    assert module.sync_points(), "no kernel ran"
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_emulator_is_chosen_by_name_alone(emulated):
    x = torch.ones(1)
    assert backend.resolve(x) != "emulated" and "emulated" not in str(ops.backends())
    with ops.use("emulated"):
        assert backend.resolve(x) == "emulated"


def test_an_error_names_op_and_shapes(emulated):
    x = torch.ones(3, 64)
    with pytest.raises(
        RuntimeError, match=r"rms_norm_backward of \[3, 64\] torch.float32, .*block"
    ):
        emulated.rms_norm_backward(x, x, x[0], torch.ones(2))  # rstd of two rows, not three


def test_running_out_of_memory_keeps_its_type(emulated, monkeypatch):
    """Callers catch it to try a smaller batch."""

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        emulated.swiglu(torch.ones(2, 8), torch.ones(2, 8))
