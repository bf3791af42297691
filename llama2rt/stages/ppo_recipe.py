"""The recipe of `llama2rt ppo`: its keys, and which of them an algorithm has a use for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llama2rt.algorithms import losses
from llama2rt.data.sources import Source
from llama2rt.rollout.reward import ScoringOptions
from llama2rt.run import Change
from llama2rt.stages.inputs import RolloutRecipe
from llama2rt.train.lora import LoraWithoutDropout
from llama2rt.train.options import TrainOptions

Algorithm = Literal["ppo", "grpo", "rloo", "reinforce++"]
GROUPED = ("grpo", "rloo")
"""algorithms that compare a response with others to its prompt"""
# Keys that only some algorithms have a use for.
ONLY: dict[str, tuple[str, ...]] = {
    "lam": ("ppo",),
    "value_coefficient": ("ppo",),
    "value_clip": ("ppo",),
    "critic_lr": ("ppo",),
    "gamma": ("ppo", "reinforce++"),
    "divide_by_std": ("grpo",),
    "average": ("ppo", "grpo", "reinforce++"),
}
AVERAGES: dict[str, losses.Average] = {"grpo": "response"}
EXACT_KL_VOCABULARY = 8192
"""most tokens of a vocabulary for `exact_kl`: each costs both models' output layer once more, which
at 32000 tokens and a width of 4096 is as much as a block"""


class PpoRecipe(RolloutRecipe):
    """Improve a policy on prompts with PPO and two reward models."""

    init: Path
    """the policy to start from: SFT, or the rejection-sampled version (V5 in the paper)"""
    rewards: ScoringOptions
    """the models that rank responses; the critic starts from the layers of the helpfulness model,
    under a head that is fitted to the returns of one rollout of init"""
    validation: list[Source] = Field(default=[])
    """held-out prompts for early stopping, which keeps the policy with the best objective: the mean
    over the kinds of prompts of Rc in (0, 1), in standard deviations of the first policy's, less
    beta times the KL. Without them the last iteration's policy is kept"""

    algorithm: Algorithm = "ppo"
    """ppo: a critic and GAE. Without a critic: grpo (arXiv 2402.03300), a response's reward against
    its group's mean, KL in the loss; rloo (arXiv 2402.14740), against the mean of the others, a
    whole response as one action; reinforce++ (arXiv 2501.03262), its return, with the KL of each
    token, normalised over the batch"""
    group_size: int = Field(default=1, gt=0)
    """responses to a prompt; grpo and rloo need at least 2 (8 in TRL, 64 in DeepSeekMath)"""
    iterations: int = Field(default=400, gt=0)
    """200-400 in the paper"""
    batch_size: int = Field(default=512, gt=0)
    """responses an iteration"""
    mini_batch_size: int = Field(default=64, gt=0)
    """responses a gradient step"""
    epochs: int = Field(default=1, gt=0)
    """how often each response is used (the paper does not say; Ziegler et al. 2019: 4)"""
    max_epoch_kl: float | None = Field(default=None, gt=0)
    """no further mini-batch of a rollout once one is so far from the policy that sampled it: the k3
    estimate of its KL, in nats a token"""
    clip: float = Field(default=0.2, gt=0, allow_inf_nan=True)
    """how far a token's probability ratio may move from 1 and still be pushed (rloo: a response's)
    """
    average: losses.Average | None = None
    """of the tokens' losses: token, every token alike; response, every response alike; constant,
    over sampling.max_tokens (Dr. GRPO). None for token, and for response with grpo"""
    divide_by_std: bool = True
    """whether grpo divides an advantage by its group's standard deviation; Dr. GRPO (arXiv
    2503.20783) does not"""
    beta: float = Field(default=0.01, ge=0)
    """KL penalty, in whitened reward per nat (0.01 for 7B and 13B, 0.005 for 34B and 70B); with
    grpo it weighs the k3 estimate in the loss (0.04 in DeepSeekMath)"""
    kl_target: float | None = Field(default=None, gt=0)
    """the KL in nats a response to which beta is adapted from one iteration to the next (Ziegler et
    al. 2019, section 2.2: 6 and 10 there); None to keep beta"""
    kl_horizon: int = Field(default=10_000, gt=0)
    """responses in which beta adapts; their code's. An iteration changes it by at most
    0.2 batch_size / kl_horizon"""
    max_kl: float | None = Field(default=None, gt=0)
    """the run ends where a rollout's KL to the reference is larger, in nats a response: with the
    policy as it is or, with validation, the best of those that were measured until then"""
    exact_kl: bool = False
    """whether to measure a rollout's KL token by token over the whole vocabulary too, beside k1 and
    k3: for vocabularies of at most 8192 tokens"""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """discount; like lam and the two value settings not in Llama 2: those of Ziegler et al. 2019"""
    lam: float = Field(default=0.95, ge=0, le=1)
    """of generalised advantage estimation"""
    value_coefficient: float = Field(default=0.1, gt=0)
    """scale of the critic's loss; the critic's own AdamW undoes it but for gradient clipping"""
    value_clip: float = Field(default=0.2, gt=0, allow_inf_nan=True)
    """how far a value may move from the rollout's and still be pushed"""

    critic_lr: float | None = Field(default=9e-6, gt=0)
    """constant (Ouyang et al. 2022, appendix C.4); None for train.lr"""
    temperature: float = Field(default=1.0, gt=0)
    """of sampling, and of every log-probability"""
    reward_normalization: Literal["whitened", "running", "group", "none"] = "whitened"
    """of logit(Rc): whitened over the iteration's batch (the paper names no population), by mean
    and deviation of all rollouts so far, over a prompt's group, or not at all"""
    length_penalty: float = Field(default=0.0, ge=0)
    """taken off logit(Rc) per character of a response (arXiv 2405.07863)"""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """taken off the whitened reward (so: in standard deviations) of a cut response"""
    patience: int = Field(default=5, gt=0)
    """evaluations without a better objective before stopping"""

    # Constant lr 1e-6; AdamW 0.9 / 0.95 / 1e-5, weight decay 0.1, clip 1.0 as in pretraining. A
    # step of its checkpoint_every and validate_every is an iteration.
    train: TrainOptions = TrainOptions(
        lr=1e-6, schedule="constant", checkpoint_every=10, validate_every=10
    )
    lora: LoraWithoutDropout = LoraWithoutDropout()

    neutral: ClassVar = tuple(k for k in RolloutRecipe.neutral if k != "train.validate_every")
    durations: ClassVar[tuple[str, ...]] = ("iterations",)

    @model_validator(mode="after")
    def _used(self) -> Self:
        """ValueError where a key says what the algorithm would not do."""
        for key, algorithms in ONLY.items():
            default = type(self).model_fields[key].default
            if self.algorithm not in algorithms and getattr(self, key) != default:
                raise ValueError(
                    f"{key}: {self.algorithm} has no use for it (of {', '.join(algorithms)})"
                )
        if self.kl_target is None and self.kl_horizon != 10_000:
            raise ValueError("kl_horizon: only with kl_target")
        if self.kl_target is not None and not self.beta:
            raise ValueError("kl_target: beta is adapted by factors, and one of 0 stays 0")
        if self.kl_target is not None and self.kl_horizon <= 0.2 * self.batch_size:
            raise ValueError(
                f"kl_horizon: expected more than a fifth of batch_size, {self.batch_size}: beta "
                "would become 0 or negative"
            )
        return self

    @model_validator(mode="after")
    def _in_groups(self) -> Self:
        size = self.group_size
        if self.algorithm in GROUPED and size < 2:
            raise ValueError(
                f"group_size: {self.algorithm} compares a prompt's responses: expected at least 2"
            )
        if self.reward_normalization == "group":
            if self.algorithm in GROUPED:
                raise ValueError(
                    f"reward_normalization: {self.algorithm} takes a group's mean off by itself"
                )
            if size < 2:
                raise ValueError('group_size: expected at least 2 to normalise over a "group"')
        for key in ("batch_size", "mini_batch_size"):
            if getattr(self, key) % size:
                raise ValueError(f"{key}: {getattr(self, key)} is no multiple of group_size {size}")
        return self

    @property
    def has_critic(self) -> bool:
        return self.algorithm == "ppo"

    @property
    def reads_while_training(self) -> bool:
        """Whether the log-probabilities of what was sampled are those of the gradient step itself:
        it is the only one of a rollout, and nothing asks for them before it. Only GRPO's KL is no
        part of the rewards."""
        once = self.epochs == 1 and self.mini_batch_size >= self.batch_size
        return self.algorithm == "grpo" and once and self.max_kl is None and not self.exact_kl

    @property
    def averaged(self) -> losses.Average:
        """How the tokens' losses are averaged."""
        return self.average or AVERAGES.get(self.algorithm, "token")

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """As everywhere; but a run that measured its last policy out of turn, which may have become
        the best one, cannot go on as if it had not."""
        every = self.train.validate_every
        if key == "iterations" and self.validation and (not every or begun[key] % every):
            return "refused"
        return super().change(key, begun)
