"""token_logprob in CUDA, emulated, by the rule of `numerics.judge`, and its promises.

The yardstick and the inputs are in `logprob`. cuBLAS's part is done by torch on this CPU.
"""

import pytest
import torch
from logprob import both, check, same_bits, small

from llama2rt import ops
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


@pytest.mark.parametrize("strides", ["rows apart", "columns first", "one row", "one value"])
def test_any_strides(emulated, strides, dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    hidden = {
        "rows apart": torch.cat((hidden, hidden), -1)[:, :24],
        "columns first": hidden.t().contiguous().t(),
        "one row": hidden[:1].expand_as(hidden),
        "one value": hidden[:1, :1].expand_as(hidden),
    }[strides]
    apart = torch.cat((weight, weight), -1)[:, :24]
    targets = torch.stack((targets, targets), 1)[:, 0]
    upstream = torch.tensor(0.3).expand(40)
    dense = [x.contiguous() for x in (hidden, apart, targets, upstream, upstream)]
    copies = [x.clone() for x in dense]
    ours = both(emulated, hidden, apart, targets, upstream, upstream)
    assert same_bits(ours, both(emulated, *dense))
    assert same_bits(dense, copies), "an input was changed"
    assert all(x.is_contiguous() for x in ours)


def test_a_weight_with_columns_first(emulated, dtype, small_tiles, seed):
    """BLAS then adds in another order, so it is judged like any other."""
    check(
        *(emulated, 70, 33, 149, "normal", dtype, 0.7, seed),
        arrange=lambda weight: weight.t().contiguous().t(),
    )


def test_the_order_of_threads_does_not_matter(module, emulated, dtype, small_tiles):
    arguments = *small(dtype), *torch.randn(2, 40)
    results = []
    for seed in range(3):
        module.set_seed(seed)
        results.append(both(emulated, *arguments))
    assert all(same_bits(results[0], other) for other in results)


def test_narrow_targets(emulated, dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    upstream = torch.randn(2, 40)
    first, second = (both(emulated, hidden, weight, t, *upstream) for t in (targets, targets.int()))
    assert same_bits(first, second)


def test_targets_below_zero_are_not_predicted(emulated, dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    targets[3:9] = -100
    upstream = torch.randn(2, 40)
    skipped = targets < 0
    logprob, entropy, _, dhidden, _ = both(emulated, hidden, weight, targets, *upstream)
    for values in (logprob, entropy, dhidden):
        assert not values[skipped].any() and values[~skipped].any()
    logprob, entropy, lse, *gradients = both(
        emulated, hidden, weight, torch.full_like(targets, -1), *upstream
    )
    assert not any(x.any() for x in (logprob, entropy, *gradients)) and lse.isfinite().all()


def test_a_target_outside_the_vocabulary_is_not_a_number(emulated, dtype, small_tiles):
    hidden, weight, targets = small(dtype)
    targets[5] = 150
    logprob = emulated.token_logprob(hidden, weight, targets, 1.0, False)[0]
    assert logprob.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("draw", range(4))
def test_certain_targets_are_never_positive_and_lose_no_entropy(
    emulated, dtype, small_tiles, seed, draw
):
    torch.manual_seed(seed + draw)
    hidden, weight, _ = small(dtype, depth=64)
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    logprob, entropy, lse = emulated.token_logprob(hidden, weight, targets, 0.05, True)
    assert (logprob <= 0).all() and (logprob > -1e-3).float().mean() > 0.5
    assert (entropy >= 0).all()
    # Where one logit is all, no gradient is left but its rivals': an ulp of lse would give 1e-3.
    exact = (hidden.double() @ weight.double().T / 0.05).log_softmax(-1)
    certain = exact.max(-1).values > -1e-9
    upstream = torch.ones(40)
    dhidden, _ = emulated.token_logprob_backward(
        upstream, None, hidden, weight, targets, lse, None, 0.05
    )
    assert certain.any() and not logprob[certain].any()
    assert dhidden[certain].abs().max() < 1e-5


def test_no_tokens(emulated, dtype):
    hidden, weight, targets = small(dtype, tokens=0)
    logprob, entropy, lse, dhidden, dweight = both(
        emulated, hidden, weight, targets, *torch.empty(2, 0)
    )
    assert logprob.shape == entropy.shape == lse.shape == (0,)
    assert dhidden.shape == (0, 24) and not dweight.any()


def test_rows_that_are_not_aligned_are_refused(module):
    logits, row = torch.zeros(2, 12), torch.zeros(2)
    for address, stride in ((logits.data_ptr() + 4, 12), (logits.data_ptr(), 10)):
        with pytest.raises(RuntimeError, match="aligned to 16 bytes"):
            module.token_logprob(
                *(0, 2, 8, address, stride, 0, 0, 1.0),
                *(row.data_ptr(), row.data_ptr(), 0, row.data_ptr(), 0, 0),
            )


def test_through_the_ops(module):
    hidden, weight, targets = small(torch.float32)
    results = []
    for name, dtype in (("emulated", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with ops.use(name):
            logprob, entropy = ops.token_logprob(*leaves, targets, temperature=1.3, entropy=True)
        gradients = torch.autograd.grad((logprob * entropy).sum(), leaves)
        results.append([x.double() for x in (logprob, entropy, *gradients)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
