"""token_logprob in Triton, interpreted, by the rule of `numerics.judge`, and its promises.

The yardstick and the inputs are in `logprob_cases`.
"""

import logprob_cases
import pytest
import torch
from logprob_cases import both_directions, check, small
from numerics import same_bits
from strides import STRIDES

pytest.importorskip("triton", reason="Triton is not installed")

from llama2rt.kernels import logits_tile, token_logprob, token_logprob_backward
from llama2rt.ops import reference
from llama2rt.ops import triton as kernels

pytestmark = [
    pytest.mark.usefixtures("interpreted", "poisoned"),
    # Rows of a tile beyond the last token are computed like any other, and not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = {
    80: logits_tile.Launch(32, 128, 64, warps=4, stages=2, group=2),
    90: logits_tile.Launch(32, 128, 64, warps=4, stages=2, group=2, persistent=True, tma=True),
}


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def small_tiles(request, monkeypatch):
    """Several tiles, slices and parts in shapes that the interpreter can do."""
    for table in (token_logprob.FORWARD, token_logprob_backward.BACKWARD):
        monkeypatch.setitem(table, 80, SMALL[request.param])
    monkeypatch.setattr(logits_tile, "SMALL", SMALL[80])
    monkeypatch.setattr(token_logprob_backward, "SLICE", 160)
    monkeypatch.setattr(token_logprob_backward, "PART", 1)


# One tile; a depth TMA cannot read; slices of one, three and an odd number of tiles. Inputs that
# are hard to add up go to the shape of most terms.
SHAPES = [(13, 8, 3), (90, 33, 70), (41, 72, 330)]
CASES = [(s, "normal") for s in SHAPES] + [(SHAPES[-1], k) for k in ("small", "tail", "offset")]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_numerics(shape, kind, dtype, small_tiles, seed):
    check(kernels, *shape, kind, dtype, 0.7, seed)


@pytest.mark.parametrize("architecture", [80, 90])
def test_shipped_settings(architecture, monkeypatch, seed):
    monkeypatch.setattr(logits_tile, "architecture", lambda x: architecture)
    check(kernels, 131, 72, 300, "normal", torch.bfloat16, 1.0, seed)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_strides(strides, dtype, small_tiles):
    """Addresses depend on the size of an element, which fp16 shares with bf16."""
    hidden, weight, targets = small(dtype)
    hidden, weight = STRIDES[strides](hidden), STRIDES[strides](weight)
    targets = torch.stack((targets, targets), 1)[:, 0]
    upstream = torch.tensor(0.3).expand(40)
    dense = [x.contiguous() for x in (hidden, weight, targets, upstream, upstream)]
    copies = [x.clone() for x in dense]
    ours = both_directions(kernels, hidden, weight, targets, upstream, upstream)
    assert same_bits(ours, both_directions(kernels, *dense))
    assert same_bits(dense, copies), "an input was changed"
    assert all(x.is_contiguous() for x in ours)


def test_offsets_beyond_32_bits(small_tiles, far):
    hidden, weight, targets = small(torch.bfloat16, tokens=5, vocabulary=6)
    upstream = torch.randn(2, 5)
    near = both_directions(kernels, hidden, weight, targets, *upstream)
    assert same_bits(near, both_directions(kernels, far(hidden), far(weight), targets, *upstream))


def test_without_entropy_the_rest_is_the_same(dtype, small_tiles):
    arguments = *small(dtype), 0.7
    logprob, _, lse = kernels.token_logprob(*arguments, True)
    plain = kernels.token_logprob(*arguments, False)
    assert same_bits((logprob, lse), (plain[0], plain[2]))
    hidden, weight, *rest = arguments
    exact = reference.token_logprob(hidden.double(), weight.double(), *rest, False)
    torch.testing.assert_close(lse.double(), exact[2], rtol=2e-6, atol=2e-6)


def test_one_token(dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    many, one = (kernels.token_logprob(hidden[:n], weight, targets[:n], 0.7, True) for n in (40, 1))
    assert same_bits([x[:1] for x in many], one)


def test_narrow_targets(dtype, small_tiles):
    logprob_cases.check_narrow_targets(kernels, dtype)


def test_targets_below_zero_are_not_predicted(dtype, small_tiles):
    logprob_cases.check_targets_below_zero(kernels, dtype)


def test_a_target_outside_the_vocabulary_is_not_a_number(dtype, small_tiles):
    logprob_cases.check_target_outside_the_vocabulary(kernels, dtype)


def test_certain_targets_are_never_positive_and_lose_no_entropy(dtype, small_tiles):
    logprob_cases.certain(kernels, dtype)


def test_no_tokens(dtype):
    logprob_cases.check_no_tokens(kernels, dtype)


def test_weight_gradient_is_summed_in_fp32(small_tiles):
    logprob_cases.check_weight_gradient_is_summed_in_fp32(kernels)


def test_through_the_ops():
    logprob_cases.check_through_the_ops("triton")
