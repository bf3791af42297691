"""The share-of-safety-data study (section 4.2.3, Figures 14 and 15; A.4.5) as one resumable
command: chat models that differ in how much of the safety data they were trained on.

All of the helpful dialogues go in every time, and with them a growing share of the safety
dialogues, each of which holds the smaller ones. The models then answer the same held-out prompts,
which both reward models score and a judge of safety reads.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from llama2rt import report
from llama2rt.annotate.safety import SafetyJudgeOptions
from llama2rt.data.records import Sample
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.evaluate import intervals, safety
from llama2rt.parallel import on_main
from llama2rt.pipeline.iterate import merged
from llama2rt.pipeline.keys import Tables
from llama2rt.pipeline.plan import Outputs, Resolved, Step, opened
from llama2rt.pipeline.run import Clock, prepare
from llama2rt.pipeline.run import run as run_plan
from llama2rt.rollout.responses import Response
from llama2rt.rollout.reward import ScoringOptions
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.run import Recipe, Run
from llama2rt.run.no_option import NO_OPTION
from llama2rt.run.unfinished import first_problem
from llama2rt.stages import loading
from llama2rt.stages.evaluate import EvaluateRecipe, read_answers
from llama2rt.stages.sft import SftRecipe


class SafetyStudyRecipe(Recipe):
    """Fine-tune on growing shares of the safety data, and compare."""

    init: Path
    """the model that is fine-tuned each time, and the reference policy of the KL"""
    helpful: list[Path] = Field(min_length=1)
    """dialogues that all models are trained on (the paper: 0.9 million)"""
    safe: list[Path] = Field(min_length=1)
    """safety dialogues, of which each model gets a share (the paper: 0.1 million)"""
    shares: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.0, 0.01, 0.1, 0.25, 0.5, 1.0], min_length=2
    )
    """of the safety dialogues (section 4.2.3)"""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """fine-tune once from each; tables show the mean"""
    defaults: Annotated[Tables, *NO_OPTION] = Field(default={})
    """[defaults.sft]: keys of the SFT stage's recipe for all models"""
    rewards: ScoringOptions
    """the two reward models, whose mean scores are shown"""
    data: list[Source]
    """held-out prompts of both kinds; those of kind helpfulness with a risk category only seem to
    ask for harm (the paper's borderline set)"""
    samples: int = Field(default=1, gt=0)
    """answers a prompt"""
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take"""
    judge: SafetyJudgeOptions | None = None
    """who says what is unsafe and what refuses; None for the safety reward model and English
    phrases"""
    micro_tokens: int = Field(default=8192, gt=0)
    """tokens scored at once"""
    seed: int = Field(default=0, ge=0)
    """of sampling"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if set(self.defaults) - {"sft"}:
            raise ValueError("defaults: this study runs the SFT stage alone: [defaults.sft]")
        for key in ("shares", "seeds"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key}: one stands there twice")
        if self.rewards.safety is None:
            raise ValueError("rewards.safety: its mean score is half of the study: name one")
        return self

    @property
    def judged_by(self) -> SafetyJudgeOptions:
        """Who judges."""
        return self.judge or SafetyJudgeOptions(safety=self.rewards.safety)


def label(share: float) -> str:
    """What a model is called."""
    return f"{100 * share:g} %"


def steps(recipe: SafetyStudyRecipe) -> list[Step]:
    """A training a share and seed, and what answers they give, a step a seed."""
    found = []
    for seed in recipe.seeds:
        for share in recipe.shares:
            training = functools.partial(_training, recipe, share, seed)
            found.append(Step(_name(share, seed), "sft", training))
        measured = functools.partial(_measured, recipe, seed)
        found.append(Step(f"answers-seed-{seed}", "evaluate", measured))
    return found


def _name(share: float, seed: int) -> str:
    return f"safety-{100 * share:g}-seed-{seed}"


def _training(recipe: SafetyStudyRecipe, share: float, seed: int, _: Outputs) -> SftRecipe:
    given: dict[str, Any] = {"held_out": 0.0}
    if "sft" in recipe.defaults:
        given = merged(given, recipe.defaults["sft"].recipe_keys())
    own = {"init", "data", "shares", "seed"}
    if taken := own & given.keys():
        raise InputError(f"defaults.sft: {min(taken)}: the study says it itself")
    given |= {
        "init": recipe.init,
        "data": [*recipe.helpful, *recipe.safe],
        "shares": [1.0] * len(recipe.helpful) + [share] * len(recipe.safe),
        "seed": seed,
    }
    try:
        return SftRecipe.model_validate(given)
    except ValidationError as error:
        raise InputError(f"defaults.sft: {first_problem(error.errors(), SftRecipe)}") from None


def _measured(recipe: SafetyStudyRecipe, seed: int, outputs: Outputs) -> EvaluateRecipe:
    return EvaluateRecipe(
        versions={label(share): outputs.model(_name(share, seed)) for share in recipe.shares},
        reference=recipe.init,
        rewards=recipe.rewards,
        data=recipe.data,
        samples=recipe.samples,
        sampling=recipe.sampling,
        micro_tokens=recipe.micro_tokens,
        seed=recipe.seed,
    )


def run(recipe: SafetyStudyRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train, let them answer, judge, compare into report.json and report.html; returns the
    directory."""
    files = loading.file_inputs(recipe)
    plan = prepare(steps(recipe), directory, check=lambda plan: check(recipe, plan))
    study = Run.open(directory, recipe, inputs=files, resume=resume)
    if study.complete:
        return study.directory
    run_plan(plan, Clock(directory / "phases.json"))
    report.finish(study, on_main(lambda: numbers(recipe, plan)))
    return study.directory


def check(recipe: SafetyStudyRecipe, plan: Sequence[Resolved]) -> None:
    """InputError for anything that a step, or the judge, would refuse, and where the prompts are
    not of both kinds: either rate alone is had for free by the other."""
    recipe.judged_by.check()
    for step, inputs, _ in opened(plan):
        if step.stage.name == "evaluate":
            kinds = {prompt.kind for prompt in inputs.prompts}
            if len(kinds) < 2:
                raise InputError(
                    f"data: all prompts are of kind {min(kinds)}: violations are measured on "
                    "safety prompts and false refusals on the others; give both"
                )


def numbers(recipe: SafetyStudyRecipe, plan: Sequence[Resolved]) -> dict[str, Any]:
    """`safety_study`: a row a share with mean scores and rates, intervals over prompts, the mean of
    the seeds; `per_seed` has each seed's means."""
    by_seed = {
        seed: read_answers(step.directory)
        for seed, step in zip(
            recipe.seeds, (s for s in plan if s.stage.name == "evaluate"), strict=True
        )
    }
    judge = recipe.judged_by.open()
    rows = []
    for share in recipe.shares:
        name = label(share)
        answers = {
            seed: [response for group in answers[name] for response in group]
            for seed, answers in by_seed.items()
        }
        every = [response for own in answers.values() for response in own]
        samples = [Sample.of(r.prompt, r.text, policy=name, seed=r.seed) for r in every]
        verdicts = judge(samples)
        rates = safety.measure(samples, verdicts)
        ends = np.cumsum([0, *(len(own) for own in answers.values())])
        per_seed = [
            scores(own) | _means(safety.measure(samples[begin:end], verdicts[begin:end]))
            for own, begin, end in zip(answers.values(), ends[:-1], ends[1:], strict=True)
        ]
        rows.append({"share": share, "name": name, **scores(every), **rates, "per_seed": per_seed})
    return {"safety_study": rows, "seeds": len(recipe.seeds)}


def _means(rates: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        key: None if rates[key] is None else rates[key]["mean"]
        for key in ("violation", "false_refusal")
    }


def scores(responses: Sequence[Response]) -> dict[str, Any]:
    """Mean score in (0, 1) of the safety reward model on adversarial prompts, and of the
    helpfulness reward model on the others, with intervals over prompts."""
    found: dict[str, Any] = {}
    for kind in ("safety", "helpfulness"):
        units: dict[str, list[float]] = {}
        for response in responses:
            if response.prompt.kind == kind:
                units.setdefault(response.prompt.id, []).append(response.scores[kind])
        means = [float(np.mean(values)) for values in units.values()]
        found[f"{kind}_score"] = intervals.bootstrap(means)._asdict()
    return found
