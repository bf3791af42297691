"""GAE against its definition, whitening, and the three KL estimators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt.algorithms import advantages


def brute_force(rewards, values, lengths, gamma, lam):
    out, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length], values[start : start + length]
        start += length
        running, one = 0.0, []
        for t in reversed(range(length)):
            following = v[t + 1] if t + 1 < length else 0.0
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            one.append(running)
        out += one[::-1]
    return out


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_gae_equals_its_definition(lengths, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rewards = torch.randn(total, generator=generator, dtype=torch.float64)
    values = torch.randn(total, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ours, returns = advantages.gae(rewards, values, cu_seqlens, gamma, lam)
    expected = brute_force(rewards.tolist(), values.tolist(), lengths, gamma, lam)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, ours + values)


def test_gae_never_leaves_its_response():
    """A neighbour's reward, however large, changes nothing: there is no padding to leak over."""
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    values = torch.randn(5)
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    alone, _ = advantages.gae(rewards, values, cu_seqlens, 1.0, 0.95)
    rewards[3:] = 1e6
    beside, _ = advantages.gae(rewards, values, cu_seqlens, 1.0, 0.95)
    assert torch.equal(alone[:3], beside[:3])


def test_gae_refuses_mismatched_lengths():
    with pytest.raises(ValueError, match="cu_seqlens"):
        advantages.gae(torch.zeros(4), torch.zeros(4), torch.tensor([0, 3]), 1.0, 1.0)
    with pytest.raises(ValueError, match="rewards"):
        advantages.gae(torch.zeros(4), torch.zeros(3), torch.tensor([0, 4]), 1.0, 1.0)


def test_whiten():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    white = advantages.whiten(x)
    torch.testing.assert_close(white.mean(), torch.tensor(0.0))
    torch.testing.assert_close(white.std(unbiased=False), torch.tensor(1.0))
    torch.testing.assert_close(advantages.whiten(x, shift_mean=False).mean(), x.mean())
    assert advantages.whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert advantages.whiten(torch.full((3,), 2.0)).tolist() == [0.0] * 3
    # A thousand saturated rewards: their mean in fp32 is not quite one of them.
    assert not advantages.whiten(torch.full((1000,), 27.631021)).any()
    assert not advantages.whiten(torch.empty(0)).numel()
    assert advantages.whiten(torch.tensor([1.0, torch.nan])).isnan().all()


def test_kl_estimators_agree_with_the_exact_value():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(20, generator=generator).log_softmax(-1)
    reference = (policy + 0.3 * torch.randn(20, generator=generator)).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    for estimator in ("k1", "k3"):
        estimate = advantages.kl(policy[drawn], reference[drawn], estimator)
        error = estimate.std() / len(drawn) ** 0.5
        assert abs(estimate.mean() - exact) < 5 * error
    assert (advantages.kl(policy[drawn], reference[drawn], "k2") >= 0).all()
    assert (advantages.kl(policy[drawn], reference[drawn], "k3") >= 0).all()
    torch.testing.assert_close(
        advantages.kl(policy[drawn], reference[drawn], "k2").mean(), exact, rtol=0.15, atol=0
    )


def test_kl_of_equal_models_is_zero_and_large_ones_are_not_clamped():
    x = torch.tensor([-1.0, -40.0])
    for estimator in ("k1", "k2", "k3"):
        assert advantages.kl(x, x, estimator).tolist() == [0.0, 0.0]
    assert advantages.kl(torch.tensor([0.0]), torch.tensor([-50.0])).item() == 50.0
    with pytest.raises(ValueError, match="estimator"):
        advantages.kl(x, x, "k4")
