"""Losses of reward modelling, direct preference learning and PPO, one value per example or token.

Averaging stays with the caller, who alone knows what a batch is (micro-batches, packed tokens,
several processes); of a policy's losses `micro_batch_share` is the mean. Every sigmoid goes through
`logsigmoid`, so a gap of 100 or 10,000 gives a finite loss and a finite gradient where
`log(sigmoid(x))` or `log(exp(x) + exp(y))` would not.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Average = Literal["token", "response", "constant"]

Kind = Literal["dpo", "ipo", "hinge", "kto", "nca", "exo", "robust", "simpo", "orpo"]
"""losses of (chosen, rejected) pairs"""
GroupKind = Literal["infonca", "nca_group"]
"""losses of all scored answers to a prompt"""
AnyKind = Literal[Kind, GroupKind, "kto_unpaired"]
"""and of answers by themselves, each desirable or not"""

# Kinds defined on log-probabilities averaged over a response's tokens. The others take sums.
AVERAGED: frozenset[str] = frozenset({"ipo", "simpo", "orpo"})
# Kinds without a reference model.
REFERENCE_FREE: frozenset[str] = frozenset({"simpo", "orpo"})
# Kinds in which a label is taken to be wrong with probability `label_smoothing`.
SMOOTHED: frozenset[str] = frozenset({"dpo", "exo", "robust", "simpo"})


def ranking(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry loss of a reward model, `-log sigmoid(chosen - rejected - margin)`.

    Scores and result are [n]; `margin` is a number or [n] (`rewards.margin`).
    Llama 2, section 3.2.2, equation 2; with margin 0, RLHF Workflow, section 2.2.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def safety(scores: Tensor, is_safe: Tensor) -> Tensor:
    """Auxiliary classification loss of the safety reward model, one value per response.

    Binary cross-entropy of `sigmoid(scores)` against `is_safe` (bool), both [n]. Llama 2 reports
    its effect (Table 29) and no formula; this is the simplest that fits.
    """
    return F.binary_cross_entropy_with_logits(scores, is_safe.to(scores.dtype), reduction="none")


def preference(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *,
    kind: Kind,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    kl: tuple[float, float] | None = None,
) -> Tensor:
    """Direct preference losses over response log-probabilities, all [n] -> [n].

    The caller passes averages over response tokens for the kinds in `AVERAGED` and sums for the
    rest; the references may be None for those in `REFERENCE_FREE`.

    dpo     Rafailov et al. 2023; with label_smoothing, Mitchell's conservative DPO
    ipo     Azar et al. 2023, equation 17; beta is its tau
    hinge   SLiC, Zhao et al. 2023
    kto     Ethayarajh et al. 2024 on pairs: the policy's KL, the mean log-ratio over the other side
            of the batch's pairs, is a constant (no gradient), floored at 0. `kl`: that of the
            chosen and of the rejected sides; None for the means over the pairs passed here
    nca     Chen et al. 2024, pairwise
    exo     Ji et al. 2024, equation 16; needs label_smoothing > 0
    robust  Chowdhury et al. 2024; needs label_smoothing < 0.5
    simpo   Meng et al. 2024; gamma is the target margin, in units of beta times log-probability
    orpo    Hong et al. 2024; beta weighs the odds ratio beside the chosen response's own loss

    Raises ValueError for an unknown kind, a missing reference, a smoothing outside its range, and
    for a setting that the kind would silently ignore.
    """
    _check_settings(kind, label_smoothing, gamma)
    if kind == "simpo":
        gap = beta * (policy_chosen - policy_rejected) - gamma
        return _smoothed(gap, label_smoothing)
    if kind == "orpo":
        log_odds = _log_odds(policy_chosen) - _log_odds(policy_rejected)
        return -policy_chosen - beta * F.logsigmoid(log_odds)

    if reference_chosen is None or reference_rejected is None:
        raise ValueError(f"reference: {kind} needs the reference model's log-probabilities")
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    gap = beta * (chosen - rejected)
    if kind == "dpo":
        return _smoothed(gap, label_smoothing)
    if kind == "ipo":
        return (chosen - rejected - 1 / (2 * beta)).square()
    if kind == "hinge":
        return (1 - gap).relu()
    if kind == "kto":
        means = kl or (float(chosen.detach().mean()), float(rejected.detach().mean()))
        return _kto(chosen, rejected, means, beta)
    if kind == "nca":
        return -(
            F.logsigmoid(beta * chosen)
            + 0.5 * F.logsigmoid(-beta * chosen)
            + 0.5 * F.logsigmoid(-beta * rejected)
        )
    if kind == "robust":
        kept = (1 - label_smoothing) * -F.logsigmoid(gap)
        flipped = label_smoothing * -F.logsigmoid(-gap)
        return (kept - flipped) / (1 - 2 * label_smoothing)
    return _exo(gap, label_smoothing)


def soft_labels(rewards: Tensor, alpha: float) -> Tensor:
    """softmax(rewards / alpha) over the K answers to a prompt, [..., K]: what InfoNCA and NCA want
    of each (Chen et al. 2024, section 3.1).

    The best policy for them is the reference policy times exp(reward / (alpha beta)): at alpha 1,
    that of the KL-regularised objective with beta.
    """
    return (rewards / alpha).softmax(dim=-1)


def infonca(log_ratio: Tensor, labels: Tensor, sizes: Tensor, beta: float) -> Tensor:
    """InfoNCA over n prompts with K answers each, K as `sizes` says (Chen et al. 2024, arXiv
    2402.05369, equation 9): cross-entropy of softmax(beta log-ratio) against `labels`.

    log_ratio [B], of policy to reference, summed over an answer's tokens, answers of a prompt
    behind each other; labels [B], which add up to 1 for each prompt; sizes int64 [n] -> [n].
    """
    logits = beta * log_ratio
    # No gradient through the largest: it cancels.
    largest = torch.segment_reduce(logits.detach(), "max", lengths=sizes)
    shifted = logits - largest.repeat_interleave(sizes)
    total = torch.segment_reduce(shifted.exp(), "sum", lengths=sizes, initial=0)
    log_softmax = shifted - total.log().repeat_interleave(sizes)
    return -torch.segment_reduce(labels * log_softmax, "sum", lengths=sizes, initial=0)


def nca_group(log_ratio: Tensor, labels: Tensor, sizes: Tensor, beta: float) -> Tensor:
    """NCA over n prompts with K answers each (Chen et al. 2024, equation 12), which also keeps the
    likelihood of good answers from falling; arguments as of `infonca`. On pairs with hard labels it
    is `preference`'s nca."""
    logits = beta * log_ratio
    noise = F.logsigmoid(-logits) / sizes.repeat_interleave(sizes)
    terms = labels * F.logsigmoid(logits) + noise
    return -torch.segment_reduce(terms, "sum", lengths=sizes, initial=0)


def kto_unpaired(
    log_ratio: Tensor, desirable: Tensor, kl: float, *, beta: float, weights: tuple[float, float]
) -> Tensor:
    """KTO of answers by themselves (Ethayarajh et al. 2024, equation 8): [n] -> [n].

    `desirable` bool [n]; `kl`: the policy's KL to the reference, estimated over the batch from
    answers to other prompts, a constant, floored at 0 here; `weights` of desirable and undesirable
    answers (the paper's lambda_D and lambda_U).
    """
    gap = beta * (log_ratio - max(kl, 0.0))
    return torch.where(desirable, weights[0] * torch.sigmoid(-gap), weights[1] * torch.sigmoid(gap))


def policy_clip(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate per token (Schulman et al. 2017, equation 7), to be minimised.

    All [T], or [B] where a whole response is one action (RLOO). Returns the loss and a bool [T]:
    where clipping was active, that is, where the token has no gradient.
    """
    ratio = (logprob - old_logprob).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def micro_batch_share(
    loss: Tensor, lengths: Tensor, average: Average, *, tokens: int, responses: int, longest: int
) -> Tensor:
    """What a micro-batch adds to the mean loss of a mini-batch of so many `tokens` and `responses`.

    `loss` [T] over the tokens of the micro-batch's responses, end to end, of `lengths` int64 [B].

    token     every token alike: sum / tokens (PPO; DAPO, Yu et al. 2025, equation 8)
    response  every response alike, its own mean: GRPO's 1/G sum 1/|o| sum (DeepSeekMath, arXiv
              2402.03300, equation 3), in which a token of a long response weighs less
    constant  the sum over a response's tokens divided by `longest`, the most tokens that one may
              have, whatever it has (Dr. GRPO, arXiv 2503.20783, section 3.2)
    """
    if average == "token":
        return loss.sum() / tokens
    if average == "response":
        return (loss / torch.repeat_interleave(lengths, lengths)).sum() / responses
    return loss.sum() / (responses * longest)


def value_clip(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, whose change since the rollout is clipped to +-clip.

    All [T]; returns the loss and a bool [T] of where clipping was active. From OpenAI's PPO
    (baselines; Ziegler et al. 2019); Llama 2 states no other.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain = 0.5 * (values - returns).square()
    clipped = 0.5 * (near - returns).square()
    return torch.maximum(plain, clipped), clipped > plain


def _check_settings(kind: Kind, label_smoothing: float, gamma: float) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected 0 <= value < 0.5, got {label_smoothing}")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"label_smoothing: {kind} has none, got {label_smoothing}")
    if gamma and kind != "simpo":
        raise ValueError(f"gamma: only simpo has a target margin, got {gamma} for {kind}")


def _kto(chosen: Tensor, rejected: Tensor, kl: tuple[float, float], beta: float) -> Tensor:
    chosen_kl, rejected_kl = (max(value, 0.0) for value in kl)
    desirable = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    undesirable = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return (desirable + undesirable) / 2


def _exo(gap: Tensor, label_smoothing: float) -> Tensor:
    if label_smoothing == 0:
        raise ValueError("label_smoothing: exo needs a value above 0 (its target has full support)")
    target = torch.tensor([1 - label_smoothing, label_smoothing]).log().to(gap)
    return torch.sigmoid(gap) * (F.logsigmoid(gap) - target[0]) + torch.sigmoid(-gap) * (
        F.logsigmoid(-gap) - target[1]
    )


def _smoothed(gap: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, log(1 - p) in the form that keeps its digits."""
    # A certain response (log p = 0) would have infinite odds: cut to about one fp32 step below.
    logprob = logprob.clamp(max=-1e-7)
    near_one = logprob > -0.6931
    below = torch.where(near_one, torch.full_like(logprob, -1.0), logprob)
    above = torch.where(near_one, logprob, torch.full_like(logprob, -0.5))
    complement = torch.where(near_one, (-torch.expm1(above)).log(), torch.log1p(-below.exp()))
    return logprob - complement
