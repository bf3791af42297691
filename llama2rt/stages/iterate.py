"""RLHF-V1 ... Vn (section 3.2.3) as one resumable command: a list of steps, each a stage's run.

The paper's course is rejection sampling for V1 to V4, then rejection sampling and PPO on top of it
for V5; online DPO can take the place of either. Every version is measured alike on held-out prompts
by the same reward models, and the result is a table. Left out: collecting new preferences and
refreshing the reward models between versions; name the new ones in a step's settings.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.run import Change, Recipe, Run
from llama2rt.stages import dpo, loading, phases, ppo, rejection
from llama2rt.stages.loading import Outline
from llama2rt.stages.phases import RewardModels

# Stage -> (recipe, what reads and checks its inputs, what runs it).
STAGES: dict[str, Any] = {
    "rejection": (rejection.RejectionRecipe, rejection.check, rejection.run),
    "ppo": (ppo.PpoRecipe, loading.rollout_inputs, ppo.run),
    "dpo": (dpo.DpoRecipe, loading.rollout_inputs, dpo.run),
}


class Step(Recipe):
    """One version."""

    name: str
    """such as RLHF-V1; also the folder's name"""
    stage: Literal["rejection", "ppo", "dpo"]
    parent: str | None = None
    """the version it builds on: that samples (rejection) or is trained on (ppo, dpo); None for the
    step before, and sft for the first"""
    settings: dict[str, Any] = Field(default={})
    """keys of the stage's recipe that differ from its defaults"""


# "Until RLHF (V4) ... only Rejection Sampling fine-tuning, and after that, we combined the two
# sequentially, applying PPO on top of the resulted Rejection Sampling checkpoint".
PAPER = [
    *(Step(name=f"RLHF-V{i}", stage="rejection") for i in range(1, 5)),
    Step(name="RLHF-V5-rejection", stage="rejection"),
    Step(name="RLHF-V5", stage="ppo"),
]


class IterateRecipe(Recipe):
    """Run several versions of RLHF one after another."""

    sft: Path
    """the first policy, and pi0: the reference of every KL penalty, DPO loss and measured KL"""
    base: Path | None = None
    """what each rejection-sampled version is fine-tuned from; None for sft"""
    helpfulness: Path
    """the helpfulness reward model"""
    safety: Path | None = None
    """the safety reward model; None to go by helpfulness alone"""
    data: list[Source]
    """prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    validation: list[Source]
    """held-out prompts, on which all versions are compared"""
    pool_from: int = Field(default=4, gt=0)
    """the rejection-sampled version, counted from 1, from which on the best samples of all earlier
    ones are pooled ("up to V3 ... only from the preceding iteration")"""
    max_tokens: int = Field(default=256, gt=0)
    """response length, in every step that does not set its own and in measurements"""
    max_sequences: int = Field(default=256, gt=0)
    """sampled at once, likewise"""
    cache_bytes: int | None = Field(default=None, gt=0)
    """most memory that sampling takes beside the model, likewise; None for half of what is free"""
    micro_tokens: int = Field(default=4096, gt=0)
    """most tokens in one forward pass of a measurement"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """safety score below which the safety reward rules on any prompt (section 3.2.3)"""
    seed: int = Field(default=0, ge=0)
    """the steps' seeds are derived from it and their names"""
    steps: list[Step] = Field(default=PAPER, min_length=1)
    """the versions in order; by default the paper's five"""

    @model_validator(mode="after")
    def _names(self) -> Self:
        known = {"sft"}
        for step in self.steps:
            if step.name in known or "/" in step.name:
                raise ValueError(f"steps: {step.name!r} is taken or no folder name")
            if step.parent is not None and step.parent not in known:
                raise ValueError(f"steps: {step.name}: parent {step.parent!r} is no earlier step")
            known.add(step.name)
        return self

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """Further steps after those there are make the run longer; in a step there is, what its
        stage takes for neutral is."""
        parts = key.split(".", 3)
        if parts[0] == "steps" and int(parts[1]) < len(self.steps):
            if f"steps.{parts[1]}.name" not in begun:
                return "longer"
            stage = STAGES[self.steps[int(parts[1])].stage][0]
            if parts[2] == "settings" and parts[3] in stage.neutral:
                return "neutral"
        return super().change(key, begun)


def run(recipe: IterateRecipe, directory: Path, *, resume: bool = False) -> Path:
    """All steps, then the table of versions into report.json; returns the last model's folder."""
    inputs = loading.file_inputs(
        sft=recipe.sft,
        base=recipe.base,
        helpfulness=recipe.helpfulness,
        safety=recipe.safety,
        data=recipe.data,
        validation=recipe.validation,
    )
    plan = [stage_recipe(recipe, place, directory) for place in range(len(recipe.steps))]
    run = Run.open(directory, recipe, inputs=inputs, resume=resume)
    if not run.complete:
        check(recipe, plan, directory)
    models = {"sft": recipe.sft}
    for step, resolved in zip(recipe.steps, plan, strict=True):
        models[step.name] = STAGES[step.stage][2](resolved, directory / step.name, resume=True)
    if not run.complete:
        # All on the same prompts: those that leave each version room to answer.
        context = min(loading.outline(folder).config.context for folder in models.values())
        versions = [measure(recipe, name, folder, context, run) for name, folder in models.items()]
        phases.write_report(run, {"versions": versions})
    return models[recipe.steps[-1].name]


def check(recipe: IterateRecipe, plan: list[Any], directory: Path) -> None:
    """Read and check, before step one, all that the steps and the table need: what an earlier step
    is still to leave is taken to be as the model that step trains. InputError naming the step."""
    future: dict[Path, Outline] = {}
    versions = {"sft": recipe.sft}
    for step, resolved in zip(recipe.steps, plan, strict=True):
        with naming(f"steps: {step.name}"):
            left = STAGES[step.stage][1](resolved, future)
        versions[step.name] = directory / step.name / "model"
        if not versions[step.name].exists():
            future[versions[step.name]] = left.result
    for folder in versions.values():
        tokenizer, models = loading.outlines(
            None,
            {
                "policy": folder,
                "reference": recipe.sft,
                "helpfulness": recipe.helpfulness,
                "safety": recipe.safety,
            },
            future,
        )
        policy = models.pop("policy")
        # As `measure` samples: in fp32.
        cache = loading.CacheLimit(recipe.cache_bytes, torch.float32)
        loading.read_prompts(recipe.validation, tokenizer, policy, recipe.max_tokens, models, cache)


def stage_recipe(recipe: IterateRecipe, place: int, directory: Path) -> Any:
    """The recipe of a step: the stage's defaults, what the steps share, the step's own settings.
    InputError naming the step for a setting that its stage does not have."""
    step = recipe.steps[place]
    before = recipe.steps[place - 1].name if place else "sft"
    parent = step.parent or before
    policy = recipe.sft if parent == "sft" else directory / parent / "model"
    given: dict[str, Any] = {
        "helpfulness": recipe.helpfulness,
        "safety": recipe.safety,
        "data": recipe.data,
        "validation": recipe.validation,
        "max_tokens": recipe.max_tokens,
        "max_sequences": recipe.max_sequences,
        "cache_bytes": recipe.cache_bytes,
        "threshold": recipe.threshold,
        "seed": phases.derived_seed(recipe.seed, step.name),
    }
    if step.stage == "rejection":
        earlier = [s.name for s in recipe.steps[:place] if s.stage == "rejection"]
        pooled = earlier if len(earlier) + 1 >= recipe.pool_from else []
        given |= {
            "policy": policy,
            "init": recipe.base or recipe.sft,
            "reference": recipe.sft,
            "earlier": [directory / name for name in pooled],
        }
    else:
        given |= {"init": policy, "reference": recipe.sft}
    try:
        return STAGES[step.stage][0](**(given | step.settings))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"steps: {step.name}: {problems}") from None


def measure(
    recipe: IterateRecipe, name: str, folder: Path, context: int, run: Run
) -> dict[str, Any]:
    """A row of the table: the version on the held-out prompts that do not fill `context`."""
    model, tokenizer = loading.load_llama(folder)
    reference = loading.load_companion(recipe.sft, tokenizer)
    reward_models = RewardModels.load(
        recipe.helpfulness, recipe.safety, recipe.threshold, tokenizer=tokenizer
    )
    numbers = phases.measure(
        run.samples_directory / f"{name}.jsonl",
        phases.engine(recipe, model, tokenizer),
        reference,
        reward_models,
        loading.read_prompts(
            recipe.validation, tokenizer, Outline(replace(model.config, context=context), tokenizer)
        ),
        temperature=1.0,
        max_tokens=recipe.max_tokens,
        seed=phases.derived_seed(recipe.seed, "versions"),
        policy=name,
        micro_tokens=recipe.micro_tokens,
    )
    return {"name": name, "model": str(folder), **numbers}
