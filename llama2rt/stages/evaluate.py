"""Versions side by side: the same held-out prompts, random numbers and reward models.

Each version answers at temperature 1, that is, as it is and not sharpened. A judge, where there is
one, reads the same answers, which shows where it and the reward models part (section 3.2.1:
Goodhart's law). Best-of-N and temperature curves (Figures 7 and 8) come from further samples of
some prompts.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from llama2rt import report
from llama2rt.data.records import Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.rollout import metrics, sampling
from llama2rt.rollout.logprobs import response_logprobs
from llama2rt.rollout.responses import Response, response_example
from llama2rt.rollout.reward import RewardModels, RewardOptions
from llama2rt.rollout.sampling import Sampler, SamplingOptions, derived_seed
from llama2rt.run import Recipe, Run, manifest
from llama2rt.stages import loading
from llama2rt.stages.loading import Future, Opened, Outline
from llama2rt.text.tokenizer import Tokenizer

Answers = dict[str, list[list[Response]]]
"""by version, prompt and sample"""


class CurveOptions(BaseModel):
    """Further samples for the curves of reward against the number of samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: list[str] = Field(default=[])
    """of which versions; none by default"""
    prompts: int = Field(default=60, gt=0)
    """the first so many"""
    samples: int = Field(default=8, gt=1)
    """N, the most samples"""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default=[0.7, 1.0, 1.3], min_length=1)


class EvaluateRecipe(Recipe):
    """Measure versions of a policy on the same held-out prompts."""

    versions: dict[str, Path]
    """model folders by name, in the order of the table"""
    reference: Path
    """the reference policy, pi0, of the KL"""
    rewards: RewardOptions
    """the models that score"""
    data: list[Source]
    """held-out prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    samples: int = Field(default=1, gt=0)
    """answers a prompt; their mean is one unit of the intervals"""
    curves: CurveOptions = CurveOptions()
    """reward against the number of samples"""
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take"""
    micro_tokens: int = Field(default=8192, gt=0)
    """most tokens in one forward pass"""
    seed: int = Field(default=0, ge=0)
    """of sampling"""


@dataclass(frozen=True)
class EvaluateInputs(Opened):
    """What a run reads besides weights; it leaves no model."""

    tokenizer: Tokenizer
    prompts: list[Prompt]
    result: None = None


def run(recipe: EvaluateRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Sample, score, measure into report.json; returns the directory, which holds the samples."""
    run = Run.open(directory, recipe, inputs=loading.file_inputs(recipe), resume=resume)
    if run.complete:
        return run.directory
    inputs = open_inputs(recipe)
    scalar = functools.partial(loading.load_scalar, tokenizer=inputs.tokenizer)
    models = RewardModels(
        scalar(recipe.rewards.helpfulness),
        scalar(recipe.rewards.safety) if recipe.rewards.safety is not None else None,
        recipe.rewards.threshold,
        recipe.micro_tokens,
    )
    reference = loading.load_companion(recipe.reference, inputs.tokenizer).requires_grad_(False)
    rows = []
    for name, folder in recipe.versions.items():
        sampler = version(recipe, models, name)
        answers = sample(recipe, sampler, run, inputs.prompts, recipe.samples, 1.0)
        everything = [response for group in answers for response in group]
        rows.append(
            {
                "name": name,
                "model": str(folder),
                **metrics.summary(everything),
                **divergence(sampler.engine.model, reference, everything, recipe.micro_tokens),
            }
        )
        if name in recipe.curves.versions:
            some = inputs.prompts[: recipe.curves.prompts]
            for temperature in recipe.curves.temperatures:
                sample(recipe, sampler, run, some, recipe.curves.samples, temperature)
    report.finish(run, {"versions": rows})
    return run.directory


def read_answers(directory: Path) -> tuple[Answers, dict[str, dict[float, list[list[Response]]]]]:
    """(every version's answers at temperature 1, those of the curves by version and temperature) of
    the complete run in `directory`."""
    recipe = EvaluateRecipe.model_validate(manifest.read(directory / manifest.FILE)["recipe"])
    samples, each = directory / "samples", recipe.samples
    answers = {
        name: sampling.read_samples(samples / folder_name(name, each, 1.0), each)
        for name in recipe.versions
    }
    n = recipe.curves.samples
    curves = {
        name: {
            temperature: sampling.read_samples(samples / folder_name(name, n, temperature), n)
            for temperature in recipe.curves.temperatures
        }
        for name in recipe.curves.versions
    }
    return answers, curves


def open_inputs(recipe: EvaluateRecipe, future: Future | None = None) -> EvaluateInputs:
    """All that the recipe names, read and checked before any weights are loaded; of the prompts
    those that leave every version room to answer."""
    outlines: dict[str, Outline] = {}
    for folder in recipe.versions.values():
        tokenizer, models = loading.outlines(
            None,
            {
                "version": folder,
                "reference": recipe.reference,
                "rewards.helpfulness": recipe.rewards.helpfulness,
                "rewards.safety": recipe.rewards.safety,
            },
            future,
        )
        outlines[str(folder)] = models.pop("version")
    if not outlines:
        raise InputError("versions: name at least one")
    folders = Counter(folder_name(name, 1, 1.0) for name in recipe.versions)
    for name in recipe.versions:
        if "/" in name or folders[folder_name(name, 1, 1.0)] > 1:
            raise InputError(
                f"versions: {name!r}: expected names without / that differ in more than case and "
                "spaces, since their samples' folders are named after them"
            )
    if unknown := set(recipe.curves.versions) - set(recipe.versions):
        raise InputError(f"curves.versions: {min(unknown)!r} is none of the versions")
    shortest = min(outlines.values(), key=lambda model: model.config.context)
    prompts = loading.read_prompts(
        recipe.data,
        tokenizer,
        shortest,
        recipe.sampling.max_tokens,
        models,
        loading.CacheLimit(recipe.sampling.cache_bytes, torch.float32),
    )
    return EvaluateInputs(tokenizer, prompts)


def version(recipe: EvaluateRecipe, models: RewardModels, name: str) -> Sampler:
    """What samples from a version."""
    model, tokenizer = loading.load_llama(recipe.versions[name])
    engine = recipe.sampling.engine(model, tokenizer)
    return Sampler(engine, models, recipe.sampling.max_tokens, name)


def folder_name(version: str, n: int, temperature: float) -> str:
    """Of a version's samples: a name that any file system takes."""
    return f"{version.lower().replace(' ', '-')}-{n}-at-{temperature}"


def sample(
    recipe: EvaluateRecipe,
    sampler: Sampler,
    run: Run,
    prompts: Sequence[Prompt],
    n: int,
    temperature: float,
) -> list[list[Response]]:
    """n answers to each of `prompts` at `temperature`, kept among the run's samples."""
    return sampling.sample(
        run.samples_directory / folder_name(sampler.policy, n, temperature),
        sampler,
        prompts,
        n=n,
        temperatures=[temperature],
        seed=derived_seed(recipe.seed, "evaluation"),
    )


def divergence(
    model: Llama, reference: Llama, responses: Sequence[Response], micro_tokens: int
) -> dict[str, float]:
    """KL to the reference policy in nats per response by two estimators, and the mean entropy."""
    examples = [response_example(response) for response in responses]
    logprob, entropy = response_logprobs(model, examples, 1.0, micro_tokens)
    reference_logprob, _ = response_logprobs(reference, examples, 1.0, micro_tokens)
    return {
        **metrics.kl_per_response(logprob, reference_logprob, len(responses)),
        "entropy": float(entropy.mean()),
    }
