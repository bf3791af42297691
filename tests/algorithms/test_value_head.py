"""The ridge regression behind the critic's head: exact, and honest about what it has not seen."""

import pytest
import torch

from llama2rt.algorithms.value_head import RidgeRegression


def problem(groups: int, rows: int, dim: int, noise: float, seed: int = 0):
    """Rows in groups that share their noise, as a response's tokens share its reward."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups * rows, dim, generator=generator)
    weight = torch.randn(dim, generator=generator)
    shared = torch.randn(groups, generator=generator).repeat_interleave(rows)
    targets = inputs @ weight + noise * shared
    return inputs, targets, torch.arange(groups).repeat_interleave(rows), weight


def test_a_linear_target_is_found_whatever_the_batches():
    inputs, targets, groups, weight = problem(200, 3, 12, noise=0.0)
    whole, parts = RidgeRegression(12), RidgeRegression(12)
    whole.add(inputs, targets, groups)
    for rows in torch.arange(600).split(77):
        parts.add(inputs[rows], targets[rows], groups[rows])
    for regression in (whole, parts):
        solved, explained = regression.solve()
        torch.testing.assert_close(solved, weight, rtol=1e-3, atol=1e-3)
        assert explained > 0.999


def test_groups_that_share_their_noise_are_left_out_together():
    """40 groups of 20 equal rows in 64 dimensions: rows drawn one by one would seem explained."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 64, generator=generator).repeat_interleave(20, 0)
    targets = torch.randn(40, generator=generator).repeat_interleave(20)
    groups = torch.arange(40).repeat_interleave(20)
    regression = RidgeRegression(64)
    regression.add(inputs, targets, groups)
    solved, explained = regression.solve()
    assert 0.0 <= explained < 0.2
    assert float((inputs @ solved).var()) < 0.5 * float(targets.var())


@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_nothing_to_explain_gives_zeros(which):
    inputs, targets, groups, _ = problem(10, 2, 4, noise=0.0)
    regression = RidgeRegression(4)
    zero = which == "inputs"
    regression.add(inputs * (not zero), targets * zero, groups)
    solved, explained = regression.solve()
    assert torch.equal(solved, torch.zeros(4)) and explained == 0.0


def test_one_group_alone_proves_nothing_and_gives_zeros():
    """Every penalty is then as good as any other: a fit to one response would be its noise."""
    inputs, targets, groups, _ = problem(1, 6, 4, noise=0.5)
    regression = RidgeRegression(4)
    regression.add(inputs, targets, groups)
    solved, explained = regression.solve()
    assert torch.equal(solved, torch.zeros(4)) and explained == 0.0
