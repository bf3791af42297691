"""A plan: steps in order, each a stage whose recipe is a function of what earlier steps leave.

Where a step leaves what it makes is known before it has run, so the whole plan is resolved, and its
inputs are checked, before the first step begins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2rt.errors import InputError, naming
from llama2rt.run import Recipe
from llama2rt.stages import STAGES, Stage
from llama2rt.stages.loading import Future


@dataclass(frozen=True)
class Outputs:
    """Where earlier steps leave what they make."""

    directories: Mapping[str, Path]
    """run directories by the name of their step"""

    def directory(self, step: str) -> Path:
        """The run directory of an earlier step; InputError where there is no such step."""
        try:
            return self.directories[step]
        except KeyError:
            known = ", ".join(self.directories) or "none"
            raise InputError(f"{step!r} is no earlier step (those before: {known})") from None

    def model(self, step: str) -> Path:
        """The model that an earlier step trains."""
        return self.directory(step) / "model"


@dataclass(frozen=True)
class Step:
    """One run of a stage."""

    name: str
    """also its folder's"""
    stage: str
    """its name in `stages.STAGES`"""
    recipe: Callable[[Outputs], Recipe]
    """its recipe, given the earlier steps' outputs"""
    purpose: str = ""
    """what it is for, in a few words for people"""


@dataclass(frozen=True)
class Resolved:
    """A step of a plan with its recipe, in its run directory."""

    name: str
    stage: Stage
    recipe: Recipe
    directory: Path
    purpose: str = field(default="", compare=False)


def resolve(steps: Sequence[Step], directory: Path) -> list[Resolved]:
    """The recipes of all steps, whose run directories lie below `directory`. InputError naming the
    step for a recipe that is wrong, and for two steps of one name."""
    resolved: list[Resolved] = []
    for step in steps:
        if any(step.name == earlier.name for earlier in resolved):
            raise InputError(f"steps: two are named {step.name!r}")
        outputs = Outputs({earlier.name: earlier.directory for earlier in resolved})
        with naming(f"steps: {step.name}"):
            recipe = step.recipe(outputs)
        stage = STAGES[step.stage]
        resolved.append(
            Resolved(step.name, stage, recipe, directory / step.name, step.purpose or stage.help)
        )
    return resolved


def check(plan: Sequence[Resolved]) -> None:
    """Read and check, before step one, all that the steps name: what an earlier step is still to
    leave is taken to be as its stage says. InputError naming the step."""
    for _ in opened(plan):
        pass


def opened(plan: Sequence[Resolved]) -> Iterator[tuple[Resolved, Any, Future]]:
    """(step, its opened inputs, what earlier steps will have left), step by step, as `check`."""
    future = Future()
    for step in plan:
        with naming(f"steps: {step.name}"):
            inputs = step.stage.open_inputs(step.recipe, future)
        yield step, inputs, future
        for name, outline in inputs.models.items():
            if not (step.directory / name).exists():
                future.models[step.directory / name] = outline
        future.files.update(
            path for name in inputs.files if not (path := step.directory / name).exists()
        )
