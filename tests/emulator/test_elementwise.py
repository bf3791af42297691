"""RMSNorm, SwiGLU and rotary embedding in CUDA, emulated, by the rule of `numerics.judge`, and the
promises beside it.

Yardsticks in the same dtype: LLaMA's own RMSNorm; F.silu(gate) * up; Hugging Face's rotation with
tables in the storage dtype.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import draw, judge

from llama2rt import ops
from llama2rt.ops import backend, reference

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5
# One warp half empty, odd columns (single elements), several warps and packs, more rows than
# blocks, and rows longer than a block can hold.
NORM_SHAPES = [(1, 7), (3, 64), (113, 24), (5, 1040), (9, 203), (4, 8200), (3, 2051)]
GATE_SHAPES = [(1, 1), (3, 7), (113, 65), (5, 256), (2, 8448)]
INPUTS = ["normal", "small", "tail", "offset"]


def shape_name(shape):
    return f"{shape[0]}x{shape[1]}"


def wide(*tensors):
    return [t.double() for t in tensors]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def llama_rms_norm(x, weight):
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return weight * (x.float() * rstd).to(x.dtype)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=shape_name)
def test_rms_norm(emulated, shape, kind, dtype, seed):
    """Both ops, forward and backward, the residual's gradient present and absent."""
    x, residual = draw(shape, dtype, kind, seed), draw(shape, dtype, kind, seed + 1)
    dy, dsummed = draw(shape, dtype, "normal", seed + 2), draw(shape, dtype, "normal", seed + 3)
    weight = draw(shape[1:], dtype, "normal", seed + 4)
    y, summed, rstd = emulated.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert same_bits(emulated.rms_norm(summed, weight, EPS), (y, rstd))

    exact, exact_rstd = reference.rms_norm(*wide(summed, weight), EPS)
    leaves = [summed.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = llama_rms_norm(*leaves)
    judge("y", y, exact, theirs.detach())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)

    dx, dweight = torch.autograd.grad(theirs, leaves, dy)
    for ours, extra in (
        (emulated.rms_norm_backward(dy, summed, weight, rstd), None),
        (emulated.add_rms_norm_backward(dy, dsummed, summed, weight, rstd), dsummed),
    ):
        expected = reference.add_rms_norm_backward(
            dy.double(),
            None if extra is None else extra.double(),
            *wide(summed, weight),
            exact_rstd,
        )
        judge("dx", ours[0], expected[0], dx if extra is None else dx + extra, gradient=True)
        judge("dweight", ours[1], expected[1], dweight, gradient=True)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", GATE_SHAPES, ids=shape_name)
def test_swiglu(emulated, shape, kind, dtype, seed):
    gate, up = draw(shape, dtype, kind, seed), draw(shape, dtype, kind, seed + 1)
    dy = draw(shape, dtype, "normal", seed + 2)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    theirs = F.silu(leaves[0]) * leaves[1]
    judge("y", emulated.swiglu(gate, up), reference.swiglu(*wide(gate, up)), theirs.detach())
    for name, *three in zip(
        ("dgate", "dup"),
        emulated.swiglu_backward(dy, gate, up),
        reference.swiglu_backward(*wide(dy, gate, up)),
        torch.autograd.grad(theirs, leaves, dy),
        strict=True,
    ):
        judge(name, *three, gradient=True)


def test_gates_far_from_zero(emulated, dtype):
    gate = torch.tensor([[-300.0, -60.0, 60.0, 300.0]], dtype=dtype)
    one = torch.ones_like(gate)
    dgate, dup = emulated.swiglu_backward(one, gate, one)
    for ours, limit in (
        (emulated.swiglu(gate, one), gate.clamp_min(0)),
        (dup, gate.clamp_min(0)),
        (dgate, (gate > 0).to(dtype)),
    ):
        torch.testing.assert_close(ours, limit, rtol=0, atol=1e-20)


def tables(rows, dim):
    angle = torch.outer(torch.arange(rows), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    return angle.cos(), angle.sin()


def hugging_face(x, cos, sin, positions):
    c, s = (torch.cat((t, t), -1)[positions][:, None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * c + torch.cat((-second, first), -1) * s


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["normal", "tail", "offset"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 8, 8, 128), (113, 8, 2, 16), (7, 52, 1, 48), (3, 1, 3, 2), (2, 2, 1, 256), (3, 1, 1, 298)],
)
def test_rope(emulated, tokens, heads, kv_heads, dim, kind, index, dtype, seed):
    q = draw((tokens, heads, dim), dtype, kind, seed)
    k = draw((tokens, kv_heads, dim), dtype, kind, seed + 1)
    cos, sin = tables(300, dim)
    positions = torch.randint(300, (tokens,), dtype=index)
    exact = wide(q, k, cos, sin)
    for ours, expected, angle in (
        (emulated.rope(q, k, cos, sin, positions), reference.rope(*exact, positions), sin),
        (
            emulated.rope_backward(q, k, cos, sin, positions),
            reference.rope_backward(*exact, positions),
            -sin,
        ),
    ):
        for name, x, *two in zip("qk", (q, k), ours, expected, strict=True):
            judge(name, *two, hugging_face(x, cos, angle, positions))


@pytest.mark.parametrize("position", [-1, 3, 2**33])
def test_a_position_outside_the_tables_gives_nan_for_its_token_alone(emulated, position):
    q = torch.ones(3, 2, 8)
    rotated, _ = emulated.rope(q, q, *tables(3, 8), torch.tensor([0, position, 2]))
    assert rotated[1].isnan().all() and torch.isfinite(rotated[[0, 2]]).all()


def views(x):
    """Matrices of 9 rows and as many columns with every kind of strides."""
    yield torch.cat((x, x), -1)[:, : x.shape[1]]  # rows apart
    yield torch.cat((x[:, :1], x), -1)[:, 1:]  # off alignment
    yield x.t().contiguous().t()  # columns first
    yield x[:1].expand_as(x)  # one row
    yield x[:1, :1].expand_as(x)  # one value


@pytest.mark.parametrize("columns", [75, 136])
def test_any_strides_of_rows(emulated, columns, dtype):
    base = torch.randn(9, columns).to(dtype)
    weight, rstd = torch.randn(columns).to(dtype), torch.rand(9)
    for x in views(base):
        dense, copy = x.contiguous(), x.clone()
        calls = [
            lambda x: (emulated.swiglu(x, x),),
            lambda x: emulated.swiglu_backward(x, x, x),
            lambda x: emulated.add_rms_norm(x, x, weight, EPS),
            lambda x: emulated.add_rms_norm_backward(x, x, x, weight, rstd),
        ]
        for call in calls:
            for ours, expected in zip(call(x), call(dense), strict=True):
                # Unaligned rows are read element by element: sums are added in another order.
                torch.testing.assert_close(ours, expected)
        assert torch.equal(x, copy), "an input was changed"


@pytest.mark.parametrize("strides", ["fused", "heads first", "columns first", "one token"])
def test_any_strides_of_heads(emulated, strides, dtype):
    x = torch.randn(5, 6, 24).to(dtype)
    x = {
        "fused": lambda: x.view(5, 144)[:, 3:135].view(5, 11, 12),
        "heads first": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": lambda: x.transpose(0, 2).contiguous().transpose(0, 2),
        "one token": lambda: x[:1].expand_as(x),
    }[strides]()
    q, k = x[:, :4], x[:, 4:]
    cos, sin = tables(9, x.shape[2])
    positions, copy = torch.tensor([8, 0, 3, 3, 1]), x.clone()
    for function in (emulated.rope, emulated.rope_backward):
        dense = function(q.contiguous(), k.contiguous(), cos, sin, positions)
        assert same_bits(function(q, k, cos, sin, positions), dense)
    assert torch.equal(x, copy), "an input was changed"


def test_offsets_beyond_32_bits(emulated, far):
    near = torch.randn(4, 64).bfloat16()
    x, weight, rstd = far(near), torch.randn(64).bfloat16(), torch.rand(4)
    heads, near_heads = far(near.view(4, 4, 16)), near.view(4, 4, 16)
    rest = (*tables(9, 16), torch.tensor([8, 0, 3, 3]))
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
    x, weight = torch.empty(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    y, summed, rstd = emulated.add_rms_norm(x, x, weight, EPS)
    dx, dweight = emulated.add_rms_norm_backward(x, x, x, weight, rstd)
    assert y.shape == summed.shape == dx.shape == (0, 64) and not dweight.any()
    assert all(
        y.shape == (0, 64) for y in (emulated.swiglu(x, x), *emulated.swiglu_backward(x, x, x))
    )
    cos, sin = tables(3, 8)
    for tokens, kv_heads in ((0, 2), (2, 0)):
        q = torch.ones(tokens, 2, 8, dtype=dtype)
        ours = emulated.rope(q, q[:, :kv_heads], cos, sin, torch.zeros(tokens, dtype=torch.int32))
        assert torch.equal(ours[0], q) and ours[1].shape == (tokens, kv_heads, 8)


def test_through_the_ops(emulated, module):
    x, residual, weight = (
        torch.randn(*s, requires_grad=True) for s in ((3, 5, 24), (3, 5, 24), (24,))
    )
    cos, sin = tables(15, 8)
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


def test_an_error_names_op_and_shapes(emulated, module):
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
