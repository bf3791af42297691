"""What responses are worth: the models that rank them, as a recipe names them and as they score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llama2rt.algorithms import rewards
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.rollout.frozen import shared_over
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.ranking import Ranking
from llama2rt.rollout.responses import Response
from llama2rt.rollout.scoring import score_tokens


class RewardOptions(BaseModel):
    """The models that rank responses."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    helpfulness: Path | None = None
    """the best helpfulness reward model available; without it, give preference"""
    safety: Path | None = None
    """the safety reward model; None to go by helpfulness alone"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """below this safety score the safety reward replaces helpfulness (section 3.2.3)"""
    preference: Path | None = None
    """a pairwise preference model (the stage preference), which compares a prompt's answers with
    each other and ranks them in place of helpfulness, in rejection sampling and online DPO. Beside
    it, helpfulness scores what has nothing to be compared with: answers to held-out prompts"""
    ranking: Ranking = "win_rate"
    """how comparisons rank n answers: win_rate, the mean probability of being better than each of
    the others, n (n - 1) / 2 comparisons; or tournament, whose first and last are the best and the
    worst, in 3 n / 2 (arXiv 2405.07863)"""

    @model_validator(mode="after")
    def _someone_ranks(self) -> Self:
        if self.helpfulness is None and self.preference is None:
            raise ValueError("give rewards.helpfulness or rewards.preference")
        if self.safety is not None and self.preference is not None:
            raise ValueError(
                "preference ranks alone, and safety would have no say: leave one of them out"
            )
        if self.safety is not None and self.helpfulness is None:
            raise ValueError("safety: only beside helpfulness")
        if self.ranking != "win_rate" and self.preference is None:
            raise ValueError("ranking: only with preference")
        return self

    @property
    def scoring(self) -> Path:
        """`helpfulness`, for what needs a score of each answer by itself; InputError without."""
        if self.helpfulness is None:
            raise InputError("rewards.helpfulness: missing: an answer by itself needs a score here")
        return self.helpfulness


class SafetyOptions(RewardOptions):
    """The models that say which of a prompt's answers is safer."""

    @model_validator(mode="after")
    def _someone_ranks(self) -> Self:
        if self.safety is None:
            raise ValueError("give rewards.safety: it decides which answers are kept")
        if self.preference is not None:
            raise ValueError("preference: the safety reward model decides: leave it out")
        return self


def _scores_alone(options: RewardOptions) -> RewardOptions:
    if options.preference is not None:
        raise ValueError(
            "preference: it compares answers to one prompt, and here each is scored by itself: "
            "leave it out"
        )
    return options


ScoringOptions = Annotated[RewardOptions, AfterValidator(_scores_alone)]
"""of recipes that need a score of each answer by itself"""


@dataclass(frozen=True)
class RewardModels:
    """The models that rank responses. Without a safety model, helpfulness alone decides, and
    without a helpfulness model, safety; a preference model, where there is one, ranks in place of
    both."""

    helpfulness: ScalarModel | None
    safety: ScalarModel | None = None
    threshold: float = 0.15  # section 3.2.3
    micro_tokens: int = 16384
    """most tokens in one forward pass; a longer sequence gets one of its own"""
    preference: PairwiseModel | None = None
    ranking: Ranking = "win_rate"

    @property
    def by_name(self) -> dict[str, ScalarModel]:
        """The models that score an answer by itself, by the name of their score."""
        models = {"helpfulness": self.helpfulness, "safety": self.safety}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def shared(self) -> bool:
        """Whether all ranks have to read together."""
        return any(
            shared_over(model) is not None
            for model in (*self.by_name.values(), *self._preference_model)
        )

    @property
    def _preference_model(self) -> list[Llama]:
        return [] if self.preference is None else [self.preference.model]

    def score(
        self, sequences: Sequence[list[int]], is_safety: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Reward fp64 [n], and the scores in (0, 1) behind it by model, normalized where a model's
        folder says so.

        The reward is logit(Rc), Rc the piecewise rule of section 3.2.3 (`rewards.combine`):
        unwhitened, so comparable between iterations. `sequences` are prompts with responses as
        sampled, `is_safety` is bool [n]. Where models are `shared`, all ranks call this with the
        same. Without a model that scores, rewards are 0, until `ranked` gives them.
        """
        if not self.by_name:
            return np.zeros(len(sequences)), {}
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
        if self.safety is None:
            combined = scores["helpfulness"]
        elif self.helpfulness is None:
            combined = scores["safety"]
        else:
            combined = rewards.combine(
                scores["helpfulness"],
                scores["safety"],
                torch.from_numpy(is_safety),
                self.threshold,
            )
        reward = rewards.logit(combined).numpy()
        return reward, {name: score.numpy() for name, score in scores.items()}

    def ranked(self, groups: Sequence[Sequence[Response]]) -> list[list[Response]]:
        """The same responses, a group of each prompt's, with the rewards by which they are ranked
        against each other: where a preference model ranks, the logit of `ranking.rank` (also in
        `scores`, as "preference"), else those that they have. Comparable within a prompt only.
        Where models are `shared`, all ranks call this with the same."""
        if self.preference is None:
            return [list(group) for group in groups]
        answered = [
            (group[0].prompt.messages, [response.text for response in group]) for group in groups
        ]
        found = self.preference.rank(answered, self.ranking)
        return [
            [
                replace(
                    response,
                    reward=float(rewards.logit(torch.tensor(score, dtype=torch.float64))),
                    scores=response.scores | {"preference": score},
                )
                for response, score in zip(group, scores.tolist(), strict=True)
            ]
            for group, scores in zip(groups, found, strict=True)
        ]

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
