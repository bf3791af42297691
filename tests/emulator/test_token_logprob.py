"""token_logprob in CUDA, emulated, by the rule of `numerics.judge`, and its promises.

The yardstick and the inputs are in `logprob_cases`. cuBLAS's part is done by torch on this CPU.
"""

import logprob_cases
import pytest
import torch
from logprob_cases import both_directions, check, small
from numerics import same_bits
from strides import STRIDES, columns_first, rows_apart

from llama2rt.ops.cuda_kernels import token_logprob as calls

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of rows and columns, and parts of the weight gradient, in small shapes."""
    for name, size in (("ROWS", 32), ("COLUMNS", 72)):
        monkeypatch.setattr(calls, f"FORWARD_{name}", size)
    monkeypatch.setattr(calls, "NARROWEST", 80)
    monkeypatch.setattr(calls, "PART", 500)


@pytest.mark.parametrize("kind", ["normal", "small", "tail", "offset"])
@pytest.mark.parametrize(
    ("tokens", "depth", "vocabulary"),
    # A row of less than one pack; a remainder of rows and of each last tile; many tiles.
    [(13, 8, 3), (70, 33, 149), (41, 72, 330)],
)
def test_numerics(emulated, tokens, depth, vocabulary, kind, dtype, small_tiles, seed):
    check(emulated, tokens, depth, vocabulary, kind, dtype, 0.7, seed)


def test_shipped_tiles(emulated, dtype, seed):
    """Rows longer than a warp holds at one time, and a remainder."""
    check(emulated, 5, 24, 2311, "normal", dtype, 1.0, seed)


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(emulated, strides, dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    hidden, apart = STRIDES[strides](hidden), rows_apart(weight)
    targets = torch.stack((targets, targets), 1)[:, 0]
    upstream = torch.tensor(0.3).expand(40)
    dense = [x.contiguous() for x in (hidden, apart, targets, upstream, upstream)]
    copies = [x.clone() for x in dense]
    ours = both_directions(emulated, hidden, apart, targets, upstream, upstream)
    assert same_bits(ours, both_directions(emulated, *dense))
    assert same_bits(dense, copies), "an input was changed"
    assert all(x.is_contiguous() for x in ours)


def test_a_weight_with_columns_first(emulated, dtype, small_tiles, seed):
    """BLAS then adds in another order, so it is judged like any other."""
    check(emulated, 70, 33, 149, "normal", dtype, 0.7, seed, arrange=columns_first)


def test_the_order_of_threads_does_not_matter(module, emulated, dtype, small_tiles):
    arguments = *small(dtype), *torch.randn(2, 40)
    results = []
    for seed in range(3):
        module.set_seed(seed)
        results.append(both_directions(emulated, *arguments))
    assert all(same_bits(results[0], other) for other in results)


def test_narrow_targets(emulated, dtype, small_tiles):
    logprob_cases.check_narrow_targets(emulated, dtype)


def test_targets_below_zero_are_not_predicted(emulated, dtype, small_tiles):
    logprob_cases.check_targets_below_zero(emulated, dtype)


def test_a_target_outside_the_vocabulary_is_not_a_number(emulated, dtype, small_tiles):
    logprob_cases.check_target_outside_the_vocabulary(emulated, dtype)


@pytest.mark.parametrize("draw", range(4))
def test_certain_targets_are_never_positive_and_leave_no_gradient(
    emulated, dtype, small_tiles, seed, draw
):
    torch.manual_seed(seed + draw)
    logprob_cases.check_gradient_of_certain_targets(emulated, dtype)


def test_no_tokens(emulated, dtype):
    logprob_cases.check_no_tokens(emulated, dtype)


def test_rows_that_are_not_aligned_are_refused(module):
    memory, row = torch.zeros(32), torch.zeros(2)
    targets = torch.zeros(2, dtype=torch.int64)
    for first, stride in ((1, 12), (0, 10)):
        logits = memory.as_strided((2, 8), (stride, 1), first)
        with pytest.raises(RuntimeError, match="aligned to 16 bytes"):
            module.token_logprob(logits, targets, 0, 1.0, row, row, None, row, 0, 0)


def test_through_the_ops(module):
    logprob_cases.check_through_the_ops("emulated")
