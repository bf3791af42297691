"""What a response is worth: combining two reward models, penalties, preference margins."""

from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["small", "large", "none"]

# Llama 2, Table 27.
MARGINS: dict[str, dict[str, float]] = {
    "small": {
        "significantly_better": 1.0,
        "better": 2 / 3,
        "slightly_better": 1 / 3,
        "negligibly_better": 0.0,
    },
    "large": {
        "significantly_better": 3.0,
        "better": 2.0,
        "slightly_better": 1.0,
        "negligibly_better": 0.0,
    },
}


def margin(rating: str | None, scheme: Scheme) -> float:
    """The ranking loss's margin for a rating (Llama 2, Table 27); 0 for an unrated pair."""
    if scheme == "none" or rating is None:
        return 0.0
    if scheme not in MARGINS:
        raise ValueError(f"scheme: expected small, large or none, got {scheme!r}")
    if rating not in MARGINS[scheme]:
        raise ValueError(f"rating: expected one of {', '.join(MARGINS[scheme])}, got {rating!r}")
    return MARGINS[scheme][rating]


def combine(helpful: Tensor, safe: Tensor, is_safety: Tensor, threshold: float = 0.15) -> Tensor:
    """Llama 2's piecewise reward Rc (section 3.2.3) on scores in (0, 1), all [n].

    On a safety prompt (`is_safety`, bool), and where the safety score is below `threshold`, the
    reward is the safety score; elsewhere it is the helpfulness score. 0.15 has precision 0.89 and
    recall 0.55 on Meta Safety. Scores are sigmoids of the reward models' outputs: ValueError for
    raw ones.
    """
    for name, score in (("helpful", helpful), ("safe", safe)):
        if score.numel() and not (score.min() >= 0 and score.max() <= 1):
            raise ValueError(f"{name}: expected scores in (0, 1), got raw ones; take the sigmoid")
    return torch.where(is_safety | (safe < threshold), safe, helpful)


def logit(score: Tensor) -> Tensor:
    """Inverse of the sigmoid, in fp64: "reverse the sigmoid" of section 3.2.3.

    Scores are clamped to 1e-12 from 0 and 1, so that a saturated one stays finite (an output of
    +-27). Take the sigmoid in fp64 too: in fp32 it is already 1 at an output of 17.
    """
    return score.double().logit(eps=1e-12)


def length_penalty(rewards: Tensor, characters: Tensor, coefficient: float) -> Tensor:
    """r - coefficient * |a|, |a| the response's length in characters (RLHF Workflow, 3.2)."""
    return rewards - coefficient * characters
