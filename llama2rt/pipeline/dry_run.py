"""`--dry-run`: what a stage, or every step of a plan, would ask for, without beginning it.

All that the recipe names is opened and checked as for a run, so that a dry run finds what a run
would have refused. With a preset assumed, no file is read: every model that the recipe names is
taken to have that shape, and what only the data can say stays open.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2rt.corpus.job import dry_run as corpus_dry_run
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.errors import InputError, naming
from llama2rt.model import LlamaConfig
from llama2rt.pipeline.iterate import IterateRecipe
from llama2rt.pipeline.iterate import Plan as IteratePlan
from llama2rt.pipeline.plan import Step, opened, resolve
from llama2rt.pipeline.safety_study import SafetyStudyRecipe, check
from llama2rt.pipeline.safety_study import steps as safety_steps
from llama2rt.pipeline.study import StudyRecipe, open_inputs
from llama2rt.pipeline.study import steps as study_steps
from llama2rt.planning import Options, Plan, Work, dry_run, text
from llama2rt.run import Recipe
from llama2rt.stages import STAGES, loading
from llama2rt.stages.loading import Future

Shape = Callable[[Path], LlamaConfig]
Planned = IterateRecipe | StudyRecipe | SafetyStudyRecipe
"""recipes of several steps"""


@dataclass(frozen=True)
class DryRun:
    """The options of every verb that reads a recipe."""

    dry_run: bool = False
    """check all inputs, print parameters, memory a rank, tokens, steps and GPU-hours, and end
    without touching the run directory"""
    ranks: int | None = None
    """dry run: processes; None for as many as torchrun has started, or [parallel] asks for"""
    gpu: str = "a100-80gb"
    """dry run: a100-40gb, a100-80gb, h100 or h200"""
    fabric: str = "ib"
    """dry run: ib or roce, between nodes of 8"""
    assume: str | None = None
    """dry run: read no file and take every model that the recipe names to be of this preset, such
    as llama2-70b"""

    def say(self, verb: str, recipe: Recipe, directory: Path) -> tuple[list[str], dict[str, Any]]:
        """(lines for people, one JSON object) of a dry run of `verb`, whose run directory would be
        `directory`. InputError as from a run, and for a mesh that does not fit."""
        if isinstance(recipe, CorpusRecipe):
            return corpus_dry_run(recipe)
        options = Options(_started() if self.ranks is None else self.ranks, self.gpu, self.fabric)
        if not isinstance(recipe, Planned):
            plan = stage(verb, recipe, options, self.assume)
            return text.lines(plan), plan.as_json()
        plans = steps(recipe, directory, options, self.assume)
        hours = [plan.gpu_hours.value for plan in plans if plan.gpu_hours is not None]
        lines = [line for plan in plans for line in text.lines(plan)]
        total = f"{verb}: {len(plans)} steps, {sum(hours):,.3g} GPU-hours"
        if unknown := len(plans) - len(hours):
            total += f" without {unknown} of them, whose data earlier steps make"
        return [*lines, total], {"stage": verb, "steps": [plan.as_json() for plan in plans]}


def _started() -> int | None:
    """Processes under torchrun; None without it."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return started if started > 1 else None


def stage(verb: str, recipe: Recipe, options: Options, assumed: str | None) -> Plan:
    """Of one stage."""
    found = STAGES[verb]
    if assumed is not None:
        config = _assumed(assumed)
        return dry_run(verb, found.plan(recipe, None, lambda folder: config), options)
    inputs = found.open_inputs(recipe)
    return dry_run(verb, found.plan(recipe, inputs, _shape_of(None)), options)


def steps(recipe: Planned, directory: Path, options: Options, assumed: str | None) -> list[Plan]:
    """Of every step, in order, on as many ranks as the step that needs most; of a study, of its
    trainings."""
    resolved = resolve(_steps(recipe), directory)
    works: list[tuple[str, Work]] = []
    if assumed is not None:
        config = _assumed(assumed)
        for step in resolved:
            works.append((step.name, step.stage.plan(step.recipe, None, lambda folder: config)))
    else:
        if isinstance(recipe, StudyRecipe) and not recipe.policies:
            open_inputs(recipe, resolved)
        if isinstance(recipe, SafetyStudyRecipe):
            check(recipe, resolved)
        for step, inputs, future in opened(resolved):
            work = step.stage.plan(step.recipe, inputs, _shape_of(future))
            works.append((step.name, work))
    ranks = options.ranks or max((work.parallel.least_ranks for _, work in works), default=1)
    plans = []
    for name, work in works:
        with naming(f"steps: {name}"):
            plans.append(dry_run(name, work, Options(ranks, options.gpu, options.fabric)))
    return plans


def _steps(recipe: Planned) -> list[Step]:
    if isinstance(recipe, StudyRecipe):
        return study_steps(recipe)
    if isinstance(recipe, SafetyStudyRecipe):
        return safety_steps(recipe)
    return IteratePlan(recipe).steps()


def _assumed(preset: str) -> LlamaConfig:
    try:
        return LlamaConfig.preset(preset)
    except ValueError as error:
        raise InputError(f"assume: {str(error).removeprefix('preset: ')}") from None


def _shape_of(future: Future | None) -> Shape:
    """The shape of the model in a folder, or that an earlier step will have left there."""
    return lambda folder: loading.outline(folder, future).config
