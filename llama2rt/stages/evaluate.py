"""Versions side by side: the same held-out prompts, random numbers and reward models.

Each version answers at temperature 1, that is, as it is and not sharpened. A judge, where there is
one, reads the same answers, which shows where it and the reward models part (section 3.2.1:
Goodhart's law). Best-of-N and temperature curves (Figures 7 and 8) come from further samples of
some prompts.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt import report
from llama2rt.algorithms import advantages
from llama2rt.annotate.options import named_function
from llama2rt.data.records import Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.evaluate import best_of, diagnostics
from llama2rt.model import Llama
from llama2rt.parallel import on_main
from llama2rt.planning import Model, Phase, Work
from llama2rt.rollout import balance, sampling
from llama2rt.rollout.logprobs import segment_sums
from llama2rt.rollout.responses import Response, response_example
from llama2rt.rollout.reward import RewardModels, ScoringOptions
from llama2rt.rollout.sampling import Sampler, SamplingOptions, derived_seed, read_samples
from llama2rt.run import Recipe, Run, manifest
from llama2rt.stages import loading, plans
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
    judged: bool = False
    """whether the judge reads these samples too, and says what the best of N by reward are worth"""


class JudgeOptions(BaseModel):
    """Whoever knows what an answer is worth, besides the reward models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: str = Field(pattern=":")
    """`package.module:function`, which is called with the paths in files and gives a function of
    (prompt, response's text) -> worth, higher for better"""
    files: list[Path] = Field(default=[])
    """what the function reads"""


class EvaluateRecipe(Recipe):
    """Measure versions of a policy on the same held-out prompts."""

    versions: dict[str, Path]
    """model folders by name, in the order of the table"""
    reference: Path
    """the reference policy of the KL"""
    rewards: ScoringOptions
    """the models that score"""
    data: list[Source]
    """held-out prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    samples: int = Field(default=1, gt=0)
    """answers a prompt; their mean is one unit of the intervals"""
    curves: CurveOptions = CurveOptions()
    """reward against the number of samples"""
    judge: JudgeOptions | None = None
    """reads the answers too"""
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take"""
    micro_tokens: int = Field(default=8192, gt=0)
    """most tokens in one forward pass"""
    seed: int = Field(default=0, ge=0)
    """of sampling"""

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.curves.judged and (self.judge is None or not self.curves.versions):
            raise ValueError("curves.judged: only with a judge and curves.versions")
        return self


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
    models = loading.load_reward_models(
        recipe.rewards,
        recipe.micro_tokens,
        lambda folder: loading.load_scalar(folder, tokenizer=inputs.tokenizer),
    )
    reference = loading.load_companion(recipe.reference, inputs.tokenizer).requires_grad_(False)
    answers: Answers = {}
    kl = {}
    for name in recipe.versions:
        sampler = version(recipe, models, name)
        answers[name] = sample(recipe, sampler, run, inputs.prompts, recipe.samples, 1.0)
        # Of one answer a prompt: it takes two more forward passes.
        first = [group[:1] for group in answers[name]]
        kl[name] = divergence(sampler.engine.model, reference, first, recipe.micro_tokens)
        if name in recipe.curves.versions:
            some = inputs.prompts[: recipe.curves.prompts]
            for temperature in recipe.curves.temperatures:
                sample(recipe, sampler, run, some, recipe.curves.samples, temperature)
        del sampler  # before the next version is loaded
    # A judge, which may cost money, is asked once, whatever the number of ranks.
    report.finish(run, on_main(lambda: numbers(recipe, run.samples_directory, answers, kl)))
    return run.directory


def numbers(
    recipe: EvaluateRecipe,
    samples: Path,
    answers: Answers,
    kl: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """`diagnostics.of_versions` and, of the curves' samples, `sampling`, `length_bias` and, where
    the judge reads them too, `best_of.judged` by version and temperature."""
    worth = None
    if recipe.judge is not None:
        judge = named_function(recipe.judge.python, "judge.python")(*recipe.judge.files)

        def judged(groups: list[list[Response]]) -> list[list[float]]:
            return [[judge(r.prompt, r.text) for r in group] for group in groups]

        worth = {name: judged(groups) for name, groups in answers.items()}
    found = diagnostics.of_versions(answers, worth=worth, kl=kl)
    curves = {name: read_curves(recipe, samples, name) for name in recipe.curves.versions}
    if recipe.curves.judged:
        found["judged_best_of"] = {
            name: {
                str(temperature): best_of.judged(
                    [[r.reward for r in group] for group in groups], judged(groups)
                )
                for temperature, groups in by.items()
            }
            for name, by in curves.items()
        }
    if curves:
        found["best_of"] = diagnostics.sampling(
            {
                name: [list(itertools.chain(*groups)) for groups in zip(*by.values(), strict=True)]
                for name, by in curves.items()
            }
        )
        nearest = min(recipe.curves.temperatures, key=lambda temperature: abs(temperature - 1))
        found["length_correlation"] = diagnostics.length_bias(
            {name: by[nearest] for name, by in curves.items()}
        )
    return found


def read_answers(directory: Path) -> Answers:
    """Every version's answers at temperature 1, of the complete run in `directory`."""
    recipe = EvaluateRecipe.model_validate(manifest.read(directory / manifest.FILE)["recipe"])
    each = recipe.samples
    return {
        name: read_samples(directory / "samples" / folder_name(name, each, 1.0), each)
        for name in recipe.versions
    }


def read_curves(
    recipe: EvaluateRecipe, samples: Path, name: str
) -> dict[float, list[list[Response]]]:
    """A version's samples for the curves, by temperature."""
    n = recipe.curves.samples
    return {
        temperature: read_samples(samples / folder_name(name, n, temperature), n)
        for temperature in recipe.curves.temperatures
    }


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
    if recipe.judge is not None:
        named_function(recipe.judge.python, "judge.python")
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
    # A version with a longer context may write more after the same prompts.
    for outline in outlines.values():
        longest = loading.longest_sample(prompts, tokenizer, outline, recipe.sampling.max_tokens)
        loading.require_context(models, longest)
    return EvaluateInputs(tokenizer, prompts)


def plan(recipe: EvaluateRecipe, inputs: EvaluateInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`: one version after the other beside the reference and the reward models, in
    fp32; curves are counted, a judge is not."""
    frozen = [*plans.reward_models(recipe, shape), Model("reference", shape(recipe.reference))]
    lengths = None if inputs is None else plans.prompt_lengths(inputs.prompts, inputs.tokenizer)
    phases = []
    for name, folder in recipe.versions.items():
        answers = None
        if lengths is not None:
            answers = recipe.samples * len(lengths)
            if name in recipe.curves.versions:
                drawn = recipe.curves.samples * len(recipe.curves.temperatures)
                answers += drawn * min(recipe.curves.prompts, len(lengths))
        model = Model(name, shape(folder))
        sampling = plans.sampling_of(model, recipe.sampling, lengths, answers, frozen)
        phases.append(Phase(f"sampling {name}", frozen=frozen, sampling=sampling))
    return Work(phases)


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
    model: Llama, reference: Llama, answers: Sequence[Sequence[Response]], micro_tokens: int
) -> dict[str, list[float]]:
    """KL to the reference policy in nats a response, the mean of each prompt's answers, by two
    estimators: the unbiased k1 and the never negative k3."""
    responses = [response for group in answers for response in group]
    examples = [response_example(response) for response in responses]
    prompts = [i for i, group in enumerate(answers) for _ in group]
    logprob, _ = balance.logprobs(model, examples, 1.0, micro_tokens, prompts)
    reference_logprob, _ = balance.logprobs(reference, examples, 1.0, micro_tokens, prompts)
    lengths = torch.tensor([len(r.tokens) for r in responses], device=logprob.device)
    found = {}
    for estimator in ("k1", "k3"):
        by_token = advantages.kl(logprob, reference_logprob, estimator)
        by_response = segment_sums(by_token, lengths).view(len(answers), -1)
        found[estimator] = by_response.double().mean(dim=1).tolist()
    return found
