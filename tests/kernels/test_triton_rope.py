"""Rotary embedding in Triton, interpreted, by the rule of `numerics.judge`, and the rest.

The yardstick and the inputs are in `elementwise_cases`.
"""

import pytest
import torch
from elementwise_cases import (
    ROPE_STRIDES,
    check_rope,
    check_rope_of_nothing,
    check_rope_outside_the_tables,
    check_rope_strides,
    rope_tables,
)
from numerics import same_bits

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt.kernels import rope as kernels

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["normal", "tail", "offset"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 8, 8, 128), (113, 8, 2, 16), (7, 52, 1, 48), (3, 1, 3, 2), (2, 2, 1, 256), (5, 3, 0, 32)],
)
def test_numerics(tokens, heads, kv_heads, dim, kind, index, dtype, seed):
    check_rope(
        *(kernels, tokens, heads, kv_heads, dim, dtype, seed), kinds=(kind, kind), index=index
    )


@pytest.mark.parametrize("strides", ROPE_STRIDES)
def test_any_strides(strides, dtype):
    check_rope_strides(kernels, strides, dtype)


def test_offsets_beyond_32_bits(far):
    near = torch.randn(4, 2, 24).bfloat16()
    x = far(near)
    rest = (*rope_tables(9, 24), torch.tensor([8, 0, 3, 3]))
    assert same_bits(kernels.rope(x, x, *rest), kernels.rope(near, near, *rest))


def test_no_tokens_and_no_key_heads(dtype):
    check_rope_of_nothing(kernels, dtype)


@pytest.mark.parametrize("position", [-1, 3, 2**33])
def test_a_position_outside_the_tables_gives_nan_for_its_token_alone(position):
    check_rope_outside_the_tables(kernels, position)
