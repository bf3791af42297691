"""Rotary embedding in Triton, interpreted, by the rule of `numerics.judge`, and the rest.

Yardstick in the same dtype: Hugging Face's formulation, tables in the storage dtype.
"""

import pytest
import torch
from numerics import draw, judge

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt.kernels import rope as kernels
from llama2rt.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


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
    [(1, 8, 8, 128), (113, 8, 2, 16), (7, 52, 1, 48), (3, 1, 3, 2), (2, 2, 1, 256)],
)
def test_numerics(tokens, heads, kv_heads, dim, kind, index, dtype, seed):
    q = draw((tokens, heads, dim), dtype, kind, seed)
    k = draw((tokens, kv_heads, dim), dtype, kind, seed + 1)
    cos, sin = tables(300, dim)
    positions = torch.randint(300, (tokens,), dtype=index)
    wide = [x.double() for x in (q, k, cos, sin)]
    for ours, exact, angle in (
        (kernels.rope(q, k, cos, sin, positions), reference.rope(*wide, positions), sin),
        (
            kernels.rope_backward(q, k, cos, sin, positions),
            reference.rope_backward(*wide, positions),
            -sin,
        ),
    ):
        for name, x, *two in zip("qk", (q, k), ours, exact, strict=True):
            judge(name, *two, hugging_face(x, cos, angle, positions))


@pytest.mark.parametrize("strides", ["fused", "heads first", "columns first", "one token"])
def test_any_strides(strides, dtype):
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
    for function in (kernels.rope, kernels.rope_backward):
        dense = function(q.contiguous(), k.contiguous(), cos, sin, positions)
        for ours, expected in zip(function(q, k, cos, sin, positions), dense, strict=True):
            assert torch.equal(ours, expected)
    assert torch.equal(x, copy), "an input was changed"


def test_no_tokens_and_no_key_heads(dtype):
    cos, sin = tables(3, 8)
    for tokens, kv_heads in ((0, 2), (2, 0)):
        q = torch.ones(tokens, 2, 8, dtype=dtype)
        ours = kernels.rope(q, q[:, :kv_heads], cos, sin, torch.zeros(tokens, dtype=torch.int32))
        assert torch.equal(ours[0], q) and ours[1].shape == (tokens, kv_heads, 8)


@pytest.mark.parametrize("position", [-1, 3, 2**33])
def test_a_position_outside_the_tables_gives_nan_for_its_token_alone(position):
    q = torch.ones(3, 2, 8)
    positions = torch.tensor([0, position, 2])
    rotated, _ = kernels.rope(q, q, *tables(3, 8), positions)
    assert rotated[1].isnan().all() and torch.isfinite(rotated[[0, 2]]).all()
