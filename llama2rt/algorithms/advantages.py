"""From rewards and values to advantages, over packed responses and over groups of them.

Inputs hold response tokens only. Without prompt tokens and padding, every position in a statistic
is one that the policy acted on. A group is what was sampled for one prompt: neighbours, groups one
after the other.
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


def group_relative(
    rewards: Tensor, group_size: int, *, divide_by_std: bool = True, eps: float = 1e-4
) -> Tensor:
    """GRPO's advantage of each response over its group: (r - mean) / (std + eps), [N] -> [N].

    DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), section 4.1.2, outcome supervision; without
    the division Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783, section 3.2). The papers do not say
    which standard deviation: it is the sample's (n - 1), as in TRL and verl; `eps` is TRL's, verl
    has 1e-6. Responses that are all worth the same have an advantage of 0, and not of what the
    rounded mean leaves of their rewards, which eps is no larger than.
    """
    groups = _groups(rewards, group_size)
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantage = advantage / (groups.std(dim=1, keepdim=True) + eps)
    return torch.where(_all_equal(groups), 0.0, advantage).flatten()


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO's advantage: a response's reward less the mean of the others of its group, [N] -> [N].

    Ahmadian et al. 2024 (arXiv 2402.14740), section 2.3; `rewards` with the KL of the whole
    response taken off. Unbiased, because the baseline does not depend on the response.
    """
    groups = _groups(rewards, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return torch.where(_all_equal(groups), 0.0, groups - others).flatten()


def whiten_groups(x: Tensor, group_size: int) -> Tensor:
    """`whiten` of each group by itself, [N] -> [N]."""
    return torch.stack([whiten(group) for group in _groups(x, group_size, least=1)]).flatten()


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


def exact_kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) of next-token distributions, the sum over the vocabulary that `kl`
    estimates from one token of it: logits fp32 [..., V] twice -> [...]."""
    policy = policy_logits.log_softmax(dim=-1)
    return (policy.exp() * (policy - reference_logits.log_softmax(dim=-1))).sum(dim=-1)


def kl_adjustment(kl: float, target: float, responses: int, horizon: int) -> float:
    """What to multiply beta by after a rollout of so many responses whose mean KL was `kl`.

    Ziegler et al. 2019, section 2.2: 1 + K e with e = (kl - target) / target, clipped to +-0.2;
    their K of 0.1 is responses / horizon here, as in their code. Nats per response.
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return 1 + error * responses / horizon


def _groups(x: Tensor, group_size: int, least: int = 2) -> Tensor:
    if x.dim() != 1 or group_size < least or x.shape[0] % group_size:
        raise ValueError(
            f"rewards: expected [N], groups of {group_size} (at least {least}) one after the "
            f"other, got {tuple(x.shape)}"
        )
    return x.view(-1, group_size)


def _all_equal(groups: Tensor) -> Tensor:
    return (groups == groups[:, :1]).all(dim=1, keepdim=True)
