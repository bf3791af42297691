"""From rewards and values to advantages, over packed responses.

Inputs hold response tokens only. Without prompt tokens and padding, every position in a statistic
is one that the policy acted on.
"""

from typing import Literal

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016) -> (advantages, returns).

    `rewards`, `values` and both results are [T] over packed response tokens, `cu_seqlens` [B+1]
    marks the responses. A response ends its episode: the value after its last token is 0, whether
    it stopped or was truncated, because its one reward has then been paid in full.

    A_t = delta_t + gamma lam A_{t+1} is a linear recurrence, so it is summed by doubling: after
    round k each token holds its first 2^k terms. log2(longest) vector operations, no loop over
    tokens, and exact at the borders because a window never leaves its response.
    """
    if rewards.shape != values.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards, values: expected equal [T], got {tuple(rewards.shape)}, "
            f"{tuple(values.shape)}"
        )
    total = rewards.shape[0]
    if int(cu_seqlens[-1]) != total:
        raise ValueError(f"cu_seqlens: expected to end at {total}, got {int(cu_seqlens[-1])}")
    lengths = cu_seqlens.diff().long()
    end = torch.repeat_interleave(cu_seqlens[1:].long(), lengths)
    index = torch.arange(total, device=rewards.device)

    def ahead(x: Tensor, distance: int) -> Tensor:
        inside = index + distance < end
        return torch.where(inside, x[(index + distance).clamp(max=total - 1)], 0)

    if total == 0:
        return torch.zeros_like(rewards), torch.zeros_like(values)
    advantages = rewards + gamma * ahead(values, 1) - values
    distance = 1
    while distance < int(lengths.max()):
        advantages = advantages + (gamma * lam) ** distance * ahead(advantages, distance)
        distance *= 2
    return advantages, advantages + values


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance and, unless `shift_mean` is False, to zero mean.

    Population variance over all of `x`, as in Ziegler et al. 2019 (whose code Llama 2's section
    3.2.3 follows in whitening the reward). A single or a constant value gives 0, not nan.
    """
    mean = x.mean()
    white = (x - mean) * torch.rsqrt((x - mean).square().mean() + 1e-8)
    # Of equal values the mean is rounded, and what that leaves would be scaled up to 0.02.
    white = torch.where((x == x.flatten()[:1]).all(), 0.0, white)
    return white if shift_mean else white + mean


def kl(logprob: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Estimate KL(policy || reference) per token from tokens that the policy sampled.

    With d = logprob - reference: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, never
    negative), k3 = exp(-d) - 1 + d (unbiased, never negative). Schulman, "Approximating KL
    divergence", 2020. Nothing is clamped: a large value is a finding, not noise.
    """
    difference = logprob - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"estimator: expected k1, k2 or k3, got {estimator!r}")
