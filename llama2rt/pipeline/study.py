"""Studies of reward models as one resumable command, read from a recipe in TOML: several models on
the same held-out comparisons, trained here or found trained. Of policies: see `policies`.

What the papers show of reward models are such studies, and differ in their models alone: margins
(Llama 2, Table 28), the safety classification loss (Table 29), one model on another's test set
(Table 8), baselines (Table 7), accuracy against data and model size (Fig. 6), length bias (RLHF
Workflow, section 2).
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from llama2rt import atomic, report
from llama2rt.data.readers import read
from llama2rt.data.records import KINDS, Comparison, Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.evaluate import annotators, length, reward_models
from llama2rt.parallel import on_main
from llama2rt.pipeline import answers, policies
from llama2rt.pipeline.answers import Answer, LengthOptions
from llama2rt.pipeline.iterate import POLICIES, merged
from llama2rt.pipeline.keys import AnyStep, Tables
from llama2rt.pipeline.plan import Resolved, Step, opened
from llama2rt.pipeline.run import Clock, prepare
from llama2rt.pipeline.run import run as run_plan
from llama2rt.pipeline.scorers import BASELINES, RewardModel, Scorer
from llama2rt.pipeline.trainings import AnyModel, Training, recipe_of, trainings
from llama2rt.report import studies
from llama2rt.run import Change, Recipe, Run, hash_path, manifest
from llama2rt.run.no_option import NO_OPTION
from llama2rt.stages import loading
from llama2rt.stages.comparisons import prompt_key
from llama2rt.stages.pairs import kept_sums

logger = logging.getLogger("llama2rt.pipeline.study")


class StudyRecipe(Recipe):
    """Train and compare reward models, or policies."""

    like: Path | None = None
    """a run directory of the reward stage: its recipe is that of every training, but for what is
    said below"""
    defaults: Annotated[Tables, *NO_OPTION] = Field(default={})
    """[defaults.reward]: keys of the reward stage's recipe for all trainings; of policies, keys by
    their stages, and [defaults.evaluate]: what all are compared by"""
    models: Annotated[list[AnyModel], *NO_OPTION] = Field(default=[])
    """in the order of the tables; each with a name and the keys of the reward stage's recipe that
    differ, or the folder of one that is measured as it is: trained (a reward model), classifier (of
    transformers', for sequence classification), preference (a pairwise preference model) or judge
    (a language model). The first is what the others are compared with"""
    policies: Annotated[list[AnyStep], *NO_OPTION] = Field(default=[])
    """in place of models: each with a name, a stage (dpo, offline, ppo, rejection, sft) and the
    keys of its recipe that differ. The first is what the others are compared with"""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """train each model once from each; tables show the mean"""
    data_limits: list[Annotated[int, Field(gt=0)]] = Field(default=[])
    """train each model once on so many comparisons each, for accuracy against data; none for all"""
    tests: Annotated[dict[str, list[Source]], *NO_OPTION] = Field(default={})
    """held-out comparisons by name of the test set; none for the trainings' own validation, by
    kind"""
    length: LengthOptions = LengthOptions()
    """the study of length bias, of the first seed's models"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records of the tests to leave out before giving up"""
    micro_tokens: int = Field(default=16384, gt=0)
    """tokens scored at once"""
    seed: int = Field(default=0, ge=0)
    """of the answers that length samples"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.models and self.policies:
            raise ValueError("policies: models are compared by other numbers: a study of each")
        if not self.policies and set(self.defaults) - {"reward"}:
            raise ValueError("defaults: a study runs the reward stage alone: [defaults.reward]")
        if self.policies:
            for key in ("like", "data_limits", "tests", "length", "skip_invalid"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: says nothing of policies")
            stages = {"evaluate", *(policy.stage for policy in self.policies)}
            if (unused := set(self.defaults) - stages) and stages <= {*POLICIES, "evaluate"}:
                raise ValueError(f"defaults: no policy is of the stage {min(unused)}")
        for key in ("seeds", "data_limits"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key}: one stands there twice")
        for key, named in (("models", self.models), ("policies", self.policies)):
            names = Counter(one.name.lower() for one in named)
            if twice := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"{key}: {twice[0]!r} is taken")
        return self

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """Further models, seeds and amounts of data beside those there are make a study longer."""
        table, _, rest = key.partition(".")
        which = rest.partition(".")[0]
        item = f"{table}.{which}"
        new = not any(old == item or old.startswith(f"{item}.") for old in begun)
        # With a first amount of data, what was trained on all of it would be other models.
        if new and (
            table in ("models", "policies", "seeds") or (table == "data_limits" and which != "0")
        ):
            return "longer"
        return "neutral" if key == "micro_tokens" else super().change(key, begun)

    def trainings(self) -> list[Training]:
        """What is to be trained."""
        below = recipe_of(self.like) if self.like is not None else {}
        if "reward" in self.defaults:
            below = merged(below, self.defaults["reward"].recipe_keys())
        return trainings(self.models, below, self.data_limits, self.seeds)


@dataclass(frozen=True)
class Inputs:
    """What a study reads besides weights, checked."""

    tests: dict[str, list[Comparison]]
    left_out: dict[str, int]
    """by test: comparisons of prompts that one of the models is trained on"""
    prompts: list[Prompt]
    """of the study of length bias"""


def steps(recipe: StudyRecipe) -> list[Step]:
    """The trainings as steps of a plan. InputError where there is nothing to compare."""
    if recipe.policies:
        return policies.steps(recipe)
    if not recipe.models:
        raise InputError("models: name at least one under [[models]], or [[policies]]")
    return [training.step for training in recipe.trainings()]


def run(recipe: StudyRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train what is to be trained, score, compare into report.json, report.html and tables.md;
    returns the directory."""
    if recipe.policies:
        return policies.run(recipe, directory, resume=resume)
    # The rest is an input of each training, or hashed with the scores that depend on it.
    named = loading.file_inputs(recipe)
    files = {k: path for k, path in named.items() if k.startswith(("tests.", "length."))}
    found: list[Inputs] = []
    plan = prepare(
        steps(recipe), directory, check=lambda plan: found.append(open_inputs(recipe, plan))
    )
    inputs = on_main(lambda: found[0])
    study = Run.open(directory, recipe, inputs=files, resume=resume)
    if study.complete:
        return study.directory
    begun = sum(manifest.is_complete(step.directory) for step in plan)
    logger.info(
        "%d models trained, %d as they are; %d trainings%s, %d test sets",
        len({training.label for training in recipe.trainings()}),
        sum(model.baseline is not None for model in recipe.models),
        len(plan),
        f" of which {begun} are done" if begun else "",
        len(inputs.tests),
    )
    run_plan(plan, Clock(directory / "phases.json"))
    sampled: list[list[Answer]] = []
    if inputs.prompts:
        sampled = answers.sample(
            recipe.length, inputs.prompts, study.samples_directory, recipe.seed
        )
    numbers = on_main(lambda: measure(recipe, plan, inputs, sampled, directory))
    on_main(lambda: atomic.write(directory / "tables.md", studies.markdown(numbers)))
    report.finish(study, numbers)
    return study.directory


def open_inputs(recipe: StudyRecipe, plan: Sequence[Resolved]) -> Inputs:
    """The tests, without the prompts that any model of the plan is trained on, and the models that
    are there. InputError for anything that a training or a measurement would refuse."""
    for model in recipe.models:
        if model.baseline:
            with naming(f"models: {model.name}: {model.baseline}"):
                _baseline(recipe, model).check()
    trained_on = {
        prompt_key(comparison) for _, inputs, _ in opened(plan) for comparison in inputs.comparisons
    }
    tests: dict[str, list[Comparison]] = {}
    left_out: dict[str, int] = {}
    for name, sources in _tests(recipe).items():
        pairs: list[Comparison] = read(sources, "comparison", recipe.skip_invalid)
        kinds = [kind for kind in KINDS if any(pair.kind == kind for pair in pairs)]
        for kind in kinds:
            # Helpfulness and safety may rank the same two answers the other way round.
            test = name if len(kinds) == 1 else f"{name}, {kind}"
            own = [pair for pair in pairs if pair.kind == kind]
            kept = [pair for pair in own if prompt_key(pair) not in trained_on]
            if not kept:
                raise InputError(
                    f"tests: {test}: a model is trained on the prompts of all its pairs"
                )
            if len(kept) < len(own):
                left_out[test] = len(own) - len(kept)
                logger.warning(
                    "%s: %d comparisons of prompts that a model is trained on left out",
                    test,
                    left_out[test],
                )
            tests[test] = kept
    prompts = answers.read_prompts(recipe.length) if recipe.length.policy is not None else []
    return Inputs(tests, left_out, prompts)


def _tests(recipe: StudyRecipe) -> dict[str, list[Source]]:
    """Sources by name: those given, or the validation of the trainings, by kind."""
    if recipe.tests:
        for source in [source for sources in recipe.tests.values() for source in sources]:
            if source.held_out is not None:
                raise InputError(
                    f"tests: {source}: held_out: means nothing to held-out comparisons"
                )
        return recipe.tests
    found: dict[str, list[Source]] = {}
    for training in recipe.trainings():
        kind = training.recipe.kind
        for source in training.recipe.validation:
            own = source.model_copy(update={"kind": kind})
            if own not in found.setdefault(kind, []):
                found[kind].append(own)
    if not found:
        raise InputError(
            "tests: no held-out comparisons: name files under [tests], or as validation of the "
            "trainings"
        )
    return found


def _baseline(recipe: StudyRecipe, model: Any) -> Scorer:
    return BASELINES[model.baseline](getattr(model, model.baseline), recipe.micro_tokens)


def scorers(recipe: StudyRecipe, plan: Sequence[Resolved]) -> dict[str, list[Scorer]]:
    """What scores, by label in the order of the tables; of a trained model one a seed."""
    directories = {step.name: step.directory for step in plan}
    of_training: dict[str, dict[str, list[Scorer]]] = {}
    for training in recipe.trainings():
        folder = directories[training.step.name] / "model"
        of_model = of_training.setdefault(training.model, {})
        of_model.setdefault(training.label, []).append(RewardModel(folder, recipe.micro_tokens))
    found: dict[str, list[Scorer]] = {}
    for model in recipe.models:
        if model.baseline:
            found[model.name] = [_baseline(recipe, model)]
        else:
            found |= of_training[model.name]
    return found


def measure(
    recipe: StudyRecipe,
    plan: Sequence[Resolved],
    inputs: Inputs,
    sampled: Sequence[Sequence[Answer]],
    directory: Path,
) -> dict[str, Any]:
    """All numbers of the report. Scores are kept in scores/, each with what it depends on."""
    models = scorers(recipe, plan)
    scores: dict[str, dict[str, list[Any]]] = {test: {} for test in inputs.tests}
    rewards: dict[str, np.ndarray] = {}
    for number, (label, runs) in enumerate(models.items()):
        for seed, scorer in enumerate(runs):
            # Numbered: a test set may have any name.
            folder = directory / "scores" / f"{number}-{seed}"
            weights = hash_path(scorer.folder)
            with naming(f"models: {label}"):
                for i, (test, pairs) in enumerate(inputs.tests.items()):
                    chosen, rejected = _kept_pairs(folder / f"{i}.json", weights, scorer, pairs)
                    scores[test].setdefault(label, []).append((chosen, rejected))
                if sampled and scorer.scores_answers and not seed:
                    path = folder / "answers.json"
                    rewards[label] = _kept_answers(path, weights, scorer, inputs.prompts, sampled)
            scorer.release()
    tests = {}
    for test, pairs in inputs.tests.items():
        with naming(f"tests: {test}"):
            tests[test] = _compared(scores[test], pairs)
    numbers: dict[str, Any] = {"study": _study(recipe, plan, inputs), "tests": tests}
    if recipe.data_limits:
        numbers["scaling"] = _scaling(recipe, plan, tests)
    if sampled:
        numbers["length"] = _length(rewards, sampled, recipe.seed)
    return numbers


def _kept_pairs(
    path: Path, weights: str, scorer: Scorer, pairs: Sequence[Comparison]
) -> tuple[np.ndarray, np.ndarray]:
    source = [weights, [[pair.prompt, pair.chosen, pair.rejected, pair.kind] for pair in pairs]]

    def compute() -> dict[str, np.ndarray]:
        chosen, rejected = scorer.pairs(pairs)
        return {"chosen": chosen, "rejected": rejected}

    kept = kept_sums(path, source, compute)
    return kept["chosen"], kept["rejected"]


def _kept_answers(
    path: Path,
    weights: str,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Answer]],
) -> np.ndarray:
    """Scores fp32 [prompts, samples]."""
    items = [
        (prompt.messages, answer.text)
        for prompt, group in zip(prompts, sampled, strict=True)
        for answer in group
    ]
    kept = kept_sums(path, [weights, items], lambda: {"answers": scorer.answers(items)})
    return kept["answers"].reshape(len(prompts), -1)


def _compared(scores: Mapping[str, Any], pairs: Sequence[Comparison]) -> dict[str, Any]:
    try:
        found = reward_models.compare(scores, pairs)
    except ValueError as error:
        raise InputError(str(error)) from None
    if (agreement := annotators.agreement(pairs)) is not None:
        found["annotators"] = agreement
    return found


def _study(recipe: StudyRecipe, plan: Sequence[Resolved], inputs: Inputs) -> dict[str, Any]:
    """What was compared: `models` with their keys, those that the figures `draw` (of one that is
    trained on several amounts of data the one on most), how many trainings, what was left out."""
    most = max(recipe.data_limits, default=None)
    shown = {model.name for model in recipe.models if model.baseline}
    shown |= {training.label for training in recipe.trainings() if training.limit == most}
    return {
        "models": {model.name: model.recipe_keys() for model in recipe.models},
        "draw": [label for label in scorers(recipe, plan) if label in shown],
        "seeds": list(recipe.seeds),
        "trainings": len(plan),
        "left_out": inputs.left_out,
    }


def _scaling(
    recipe: StudyRecipe, plan: Sequence[Resolved], tests: Mapping[str, Any]
) -> dict[str, Any]:
    """By test and model: accuracy over all pairs against the comparisons that it was trained on,
    the mean over seeds, mixed in ones included."""
    directories = {step.name: step.directory for step in plan}
    sizes: dict[str, dict[str, list[int]]] = {}
    for training in recipe.trainings():
        summary = manifest.read(directories[training.step.name] / manifest.FILE)["summary"]
        of_model = sizes.setdefault(training.model, {})
        of_model.setdefault(training.label, []).append(summary["trained_on"])
    return {
        test: {
            model: [
                {"comparisons": float(np.mean(counts)), **found["models"][label]["intervals"][-1]}
                for label, counts in labels.items()
            ]
            for model, labels in sizes.items()
        }
        for test, found in tests.items()
    }


def _length(
    rewards: Mapping[str, np.ndarray], sampled: Sequence[Sequence[Answer]], seed: int
) -> dict[str, Any]:
    """Per-prompt Pearson correlation of each model's scores with length in tokens, as
    `diagnostics.length_bias`, and how many answers the length limit cut."""
    lengths = np.array([[answer.tokens for answer in group] for group in sampled], np.float64)
    models: dict[str, Any] = {}
    for label, scores in rewards.items():
        read_all = np.isfinite(scores).all(axis=1)
        if not read_all.any():
            raise InputError(f"models: {label}: cannot read all the answers to any prompt")
        found = length.correlation(scores[read_all], lengths[read_all], seed=seed)
        mean = found.mean._asdict() if found.mean else {"mean": None, "low": None, "high": None}
        models[label] = {
            **mean,
            "undefined": found.undefined,
            "unread": int((~read_all).sum()),
            "per_prompt": [float(r) if np.isfinite(r) else None for r in found.per_prompt],
        }
    every = [answer for group in sampled for answer in group]
    return {
        "models": models,
        "prompts": len(sampled),
        "samples": len(sampled[0]),
        "tokens": float(lengths.mean()),
        "cut_share": sum(not answer.finished for answer in every) / len(every),
    }
