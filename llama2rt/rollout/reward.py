"""What responses are worth: the models that rank them, as a recipe names them and as they score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from llama2rt.algorithms import rewards
from llama2rt.model import ScalarModel
from llama2rt.rollout.frozen import shared_over
from llama2rt.rollout.responses import Response
from llama2rt.rollout.scoring import score_tokens


class RewardOptions(BaseModel):
    """The models that rank responses."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    helpfulness: Path
    """the best helpfulness reward model available"""
    safety: Path | None = None
    """the safety reward model; None to go by helpfulness alone"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """below this safety score the safety reward replaces helpfulness (section 3.2.3)"""


@dataclass(frozen=True)
class RewardModels:
    """The models that rank responses. Without a safety model, helpfulness alone decides."""

    helpfulness: ScalarModel
    safety: ScalarModel | None = None
    threshold: float = 0.15  # section 3.2.3
    micro_tokens: int = 16384
    """most tokens in one forward pass; a longer sequence gets one of its own"""

    @property
    def by_name(self) -> dict[str, ScalarModel]:
        """The models by the name of their score."""
        models = {"helpfulness": self.helpfulness}
        return models if self.safety is None else models | {"safety": self.safety}

    @property
    def shared(self) -> bool:
        """Whether all ranks have to read together."""
        return any(shared_over(model) is not None for model in self.by_name.values())

    def score(
        self, sequences: Sequence[list[int]], is_safety: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Reward fp64 [n], and the scores in (0, 1) behind it by model, normalized where a model's
        folder says so.

        The reward is logit(Rc), Rc the piecewise rule of section 3.2.3 (`rewards.combine`):
        unwhitened, so comparable between iterations. `sequences` are prompts with responses as
        sampled, `is_safety` is bool [n]. Where models are `shared`, all ranks call this with the
        same.
        """
        raw = {
            name: score_tokens(
                model, sequences, micro_tokens=self.micro_tokens, mesh=shared_over(model)
            )
            for name, model in self.by_name.items()
        }
        # In fp64: in fp32 the sigmoid of 17 is already 1 and its logit lost.
        scores = {
            name: model.normalization.of(torch.from_numpy(raw[name]).double()).sigmoid()
            for name, model in self.by_name.items()
        }
        combined = scores["helpfulness"]
        if self.safety is not None:
            combined = rewards.combine(
                combined, scores["safety"], torch.from_numpy(is_safety), self.threshold
            )
        reward = rewards.logit(combined).numpy()
        return reward, {name: score.numpy() for name, score in scores.items()}

    def rescore(self, responses: Sequence[Response]) -> list[Response]:
        """The same responses with the rewards that these models give them."""
        reward, scores = self.score(
            [response.prompt_tokens + response.tokens for response in responses],
            np.array([response.prompt.kind == "safety" for response in responses]),
        )
        return [
            replace(
                response,
                reward=float(reward[i]),
                scores={name: float(score[i]) for name, score in scores.items()},
            )
            for i, response in enumerate(responses)
        ]
