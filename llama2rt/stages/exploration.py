"""Exploration in online preference learning (RLHF Workflow, arXiv 2405.07863, section 3): whose
answers are compared with the policy's own.

Besides several temperatures of the policy, a second agent may answer: an earlier checkpoint of the
run, another model, or the best of n answers of either. Best-of-n is another policy at a known
distance: its KL to the one that is sampled is at most log n - (n - 1) / n.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.parallel import on_main
from llama2rt.rollout import balance, sampling
from llama2rt.rollout.responses import Response, read_responses, write_responses
from llama2rt.rollout.sampling import by_prompts, derived_seed
from llama2rt.run import Run
from llama2rt.stages import loading
from llama2rt.stages.history import penalised
from llama2rt.stages.inputs import RolloutInputs
from llama2rt.stages.loading import Future
from llama2rt.stages.pairs import Pair

if TYPE_CHECKING:
    from llama2rt.stages.dpo import DpoRecipe

COMPARED = "compared.jsonl"


class SecondAgent(BaseModel):
    """Who answers beside the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    samples: int = Field(default=0, ge=0)
    """its answers to each prompt that are compared with the policy's samples; 0 for no second agent
    """
    best_of: int = Field(default=1, gt=0)
    """each is the best of so many that it draws"""
    model: Path | None = None
    """who it is; None for the policy, or the policy of earlier iterations"""
    iterations_back: int = Field(default=0, ge=0)
    """without model: the policy from so many iterations before, init where there were not so many
    """
    temperature: float = Field(default=1.0, gt=0)
    """at which it answers"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model is not None and self.iterations_back:
            raise ValueError("iterations_back: model says who it is, give one of them")
        said = (self.best_of, self.model, self.iterations_back, self.temperature)
        if not self.samples and said != (1, None, 0, 1.0):
            raise ValueError("samples: the second agent answers nothing: expected at least 1")
        return self

    @property
    def kl_bound(self) -> float:
        """Most KL of the best of n to what is sampled, nats (section 3; Beirami et al. 2024)."""
        return math.log(self.best_of) - (self.best_of - 1) / self.best_of

    def folder(self, policies: Sequence[Path]) -> Path:
        """Its model, where `policies` are init and what each iteration so far has left."""
        return self.model or policies[max(0, len(policies) - 1 - self.iterations_back)]

    def check(self, recipe: "DpoRecipe", future: Future | None) -> None:
        """InputError where its model writes what another model of the recipe cannot read."""
        if self.model is None:
            return
        models = {
            "second.model": self.model,
            "init": recipe.init,
            "reference": recipe.reference,
            "rewards.helpfulness": recipe.rewards.helpfulness,
            "rewards.safety": recipe.rewards.safety,
        }
        _, found = loading.outlines(recipe.tokenizer, models, future)
        own, policy = found["second.model"].config, found["init"].config
        if own.context != policy.context:
            raise InputError(
                f"second.model: its context is {own.context} tokens, the policy's "
                f"{policy.context}: expected the same"
            )


def answers(
    recipe: "DpoRecipe",
    inputs: RolloutInputs,
    policies: Sequence[Path],
    prompts: Sequence[Prompt],
    iteration: int,
    step: Run,
) -> list[list[Response]]:
    """All scored answers to each of an iteration's prompts, the policy's `samples` first, then the
    second agent's. `policies`: init and what each iteration before has left."""
    seed = derived_seed(recipe.seed, "iteration", iteration)
    own = sampling.sample(
        step.samples_directory,
        _policy(recipe, inputs, policies[-1]),
        prompts,
        n=recipe.samples,
        temperatures=recipe.temperatures,
        seed=seed,
    )
    second = recipe.second
    if not second.samples:
        return own
    path = step.samples_directory / COMPARED
    if not on_main(path.exists):
        drawn = sampling.sample(
            step.samples_directory / "second",
            inputs.policy(second.folder(policies)),
            prompts,
            n=second.samples * second.best_of,
            temperatures=[second.temperature],
            # Its own: the policy itself would draw the same again.
            seed=derived_seed(seed, "second"),
        )
        groups = [[*a, *handed_in(recipe, b)] for a, b in zip(own, drawn, strict=True)]
        # Where comparisons rank, only those of one call are comparable.
        ranked = balance.ranked(inputs.reward_models, groups)
        flat = [response for group in ranked for response in group]
        on_main(functools.partial(write_responses, path, flat))
    found = on_main(functools.partial(read_responses, path))
    return by_prompts(found, recipe.samples + second.samples)


def _policy(recipe: "DpoRecipe", inputs: RolloutInputs, folder: Path) -> sampling.Sampler:
    """The policy and its cache are gone when whoever samples lets go of it, and leave their memory
    to the model that is trained next; with an adapter the two are one model."""
    if recipe.lora.rank is None:
        return inputs.policy(folder)
    return inputs.sampler(inputs.to_train(folder), str(folder))


def handed_in(recipe: "DpoRecipe", drawn: Sequence[Response]) -> list[Response]:
    """Of each `best_of` answers in turn the one that earns most, less the length penalty; an empty
    answer only where there is no other."""
    found = []
    for group in by_prompts(drawn, recipe.second.best_of):
        spoken = [response for response in group if response.text] or group
        found.append(spoken[int(penalised(spoken, recipe.length_penalty).argmax())])
    return found


def numbers(
    recipe: "DpoRecipe", sampled: Sequence[Sequence[Response]], pairs: Sequence[Pair]
) -> dict[str, float]:
    """For the report: how often the second agent's answer is the best and the worst of the pairs,
    and how far best-of-n may be from what it samples; nothing without a second agent."""
    if not recipe.second.samples:
        return {}
    its = {id(response) for group in sampled for response in group[recipe.samples :]}
    shares: Mapping[str, float] = {
        f"second/{name}_share": sum(id(pair[side]) in its for pair in pairs) / max(1, len(pairs))
        for side, name in enumerate(("best", "worst"))
    }
    return {**shares, "second/kl_bound": recipe.second.kl_bound}
