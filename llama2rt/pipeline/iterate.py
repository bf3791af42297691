"""RLHF-V1 ... Vn (section 3.2.3) as one resumable command, read from a plan in TOML.

Without `steps` it is the paper's course: before each version, where `[defaults.annotate]` says who
compares, a batch of comparisons of the newest policy's answers is collected and both reward models
are trained anew on all of them; then rejection sampling, and for the last version PPO on top of it.
All versions are compared at the end on the same held-out prompts.

A path that begins with @ is what an earlier step leaves: `@RLHF-V1` its model, `@RLHF-V1/samples`
a file or folder of its run directory; `@sft` and `@base` are the plan's own, which steps may train
too (`sft = "@chat"`). The plan's manifest says what each step read and left, by its hash.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llama2rt import report
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.parallel import ParallelOptions, on_main
from llama2rt.pipeline import lineage
from llama2rt.pipeline.keys import AnyStep, PlanStep, Tables, step_type
from llama2rt.pipeline.plan import Outputs, Resolved, Step
from llama2rt.pipeline.run import Clock, prepare
from llama2rt.pipeline.run import run as run_plan
from llama2rt.report.versions import newest_batch
from llama2rt.rollout.sampling import SamplingOptions, derived_seed
from llama2rt.run import Change, Recipe, Run, manifest
from llama2rt.run.no_option import NO_OPTION
from llama2rt.stages import STAGES, loading
from llama2rt.stages.annotate import file_name

# Stages whose model is a version of the policy.
POLICIES = ("rejection", "ghost-attention", "ppo", "dpo", "offline", "context-distillation")

# Stages whose data and held-out data are no prompts: their steps name them.
OTHER_DATA = ("pretrain", "sft", "preference", "offline", "ghost-attention")


class FirstRewards(BaseModel):
    """The models that rank responses until a step has trained newer ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    helpfulness: Path | None = None
    """a helpfulness reward model"""
    safety: Path | None = None
    """a safety reward model"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """below this safety score the safety reward replaces helpfulness (section 3.2.3)"""


class IterateRecipe(Recipe):
    """Run several versions of RLHF one after another."""

    sft: Path
    """the first policy, and the reference policy of every KL and every DPO loss; or @NAME, what a
    step trains"""
    base: Path | None = None
    """what each rejection-sampled version is fine-tuned from; or @NAME; None for sft"""
    rewards: FirstRewards = FirstRewards()
    """the first reward models, where no step trains them"""
    data: list[Source]
    """prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    validation: list[Source]
    """held-out prompts, on which all versions are compared"""
    versions: int = Field(default=5, gt=0)
    """without steps: how many versions; PPO comes on top of the last"""
    kinds: list[Literal["helpfulness", "safety"]] = Field(
        default=["helpfulness", "safety"], min_length=1
    )
    """without steps: which reward models are refreshed"""
    pool_from: int = Field(default=4, gt=0)
    """the rejection-sampled version, counted from 1, from which on the best samples of all earlier
    ones are pooled ("up to V3 ... only from the preceding iteration")"""
    sampling: SamplingOptions = SamplingOptions()
    """length of responses, and what sampling may take, in every step and in the comparison"""
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what in every step that trains, where it says nothing else"""
    seed: int = Field(default=0, ge=0)
    """the steps' seeds are derived from it and their names"""
    defaults: Annotated[Tables, *NO_OPTION] = Field(default={})
    """by stage, keys of its recipe for all its steps: [defaults.rejection] samples = 20"""
    steps: Annotated[list[AnyStep], *NO_OPTION] = Field(default=[])
    """the steps in order, each with a name, a stage, and keys of the stage's recipe that differ;
    none for the paper's"""

    @model_validator(mode="after")
    def _names(self) -> Self:
        known = {"sft", "base"}
        for step in self.steps:
            # Not every file system tells V1 from v1.
            if step.name.lower() in known:
                raise ValueError(f"steps: {step.name!r} is taken")
            known.add(step.name.lower())
        names = {step.name for step in self.steps}
        for key in ("sft", "base"):
            name = step_name(getattr(self, key))
            if name is not None and name not in names:
                raise ValueError(f"{key}: no step is named {name!r}")
        return self

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """Further steps after those there are make the run longer; in a step there is, what its
        stage takes for neutral is."""
        table, _, rest = key.partition(".")
        which, _, rest = rest.partition(".")
        if table == "steps" and int(which) < len(self.steps):
            if f"steps.{which}.name" not in begun:
                # What has no steps of its own began as the paper's.
                return "longer" if "steps.0.name" in begun else "refused"
            if STAGES[self.steps[int(which)].stage].recipe.is_neutral(rest):
                return "neutral"
        if table == "defaults" and which in STAGES and STAGES[which].recipe.is_neutral(rest):
            return "neutral"
        return super().change(key, begun)

    def planned(self) -> list[PlanStep]:
        """The steps as they are run: those given or the paper's, and the comparison at the end."""
        steps: list[PlanStep] = list(self.steps) or self.paper()
        last = steps[-1]
        if last.stage != "evaluate":
            steps.append(PlanStep(name=f"versions at {last.name}", stage="evaluate"))
        return steps

    def paper(self) -> list[PlanStep]:
        """Section 3.2.3: up to the last but one version only rejection sampling, then both, PPO on
        top of the rejection-sampled checkpoint."""
        steps = []
        for version in range(1, self.versions + 1):
            if "annotate" in self.defaults:
                steps.append(PlanStep(name=f"comparisons-{version}", stage="annotate"))
                for kind in self.kinds:
                    keys = {"name": f"{kind}-{version}", "stage": "reward", "kind": kind}
                    steps.append(step_type("reward").model_validate(keys))
            final = version == self.versions
            name = f"RLHF-V{version}"
            steps.append(PlanStep(name=f"{name}-rejection" if final else name, stage="rejection"))
        return [*steps, PlanStep(name=name, stage="ppo")]


def run(recipe: IterateRecipe, directory: Path, *, resume: bool = False) -> Path:
    """All steps, then the table of versions into report.json; returns the last version's folder."""
    inputs = {
        key: path
        for key, path in loading.file_inputs(recipe).items()
        if not key.startswith(("steps.", "defaults.")) and step_name(path) is None
    }
    # Before the run is opened: a plan that is wrong neither begins one nor becomes its recipe.
    plan = prepare(Plan(recipe).steps(), directory)
    run = Run.open(directory, recipe, inputs=inputs, resume=resume)
    run_plan(plan, Clock(directory / "phases.json"))
    if not run.complete:
        run.keep(steps=on_main(lambda: lineage.of(plan)))
        report.finish(run, on_main(lambda: numbers(plan)))
    versions = [step.directory / "model" for step in plan if step.stage.name in POLICIES]
    chat = step_name(recipe.sft)
    first = recipe.sft if chat is None else directory / chat / "model"
    return versions[-1] if versions else first


def step_name(path: Path | None) -> str | None:
    """The step whose model a plan's own path stands for, such as @chat."""
    return str(path)[1:] if str(path).startswith("@") else None


def numbers(plan: Sequence[Resolved]) -> dict[str, Any]:
    """What the report shows: the last comparison of versions, the newest reward models, and every
    refresh of each kind, by batch."""
    found: dict[str, Any] = {"reward_models": {}, "drift": {}}
    for step in plan:
        summary = manifest.read(step.directory / manifest.FILE)["summary"]
        if step.stage.name == "evaluate":
            found |= summary
        elif step.stage.name == "reward":
            kind = summary["kind"]
            found["reward_models"][kind] = summary
            found["drift"].setdefault(kind, {}).update(newest_batch(summary.get("drift", {})))
    return found


class Plan:
    """The steps of a recipe, with what each takes from those before it."""

    def __init__(self, recipe: IterateRecipe) -> None:
        self._recipe = recipe
        self._planned = recipe.planned()

    def steps(self) -> list[Step]:
        """For `pipeline.run`."""
        return [
            Step(step.name, step.stage, functools.partial(self._resolved, index))
            for index, step in enumerate(self._planned)
        ]

    def _resolved(self, index: int, outputs: Outputs) -> Recipe:
        """A step's recipe: what earlier steps and the plan give, the stage's defaults in this plan,
        the step's own keys."""
        step = self._planned[index]
        recipe_class = STAGES[step.stage].recipe
        given = self._from_before(index, outputs)
        given = {key: value for key, value in given.items() if key in recipe_class.model_fields}
        for keys in (self._recipe.defaults.get(step.stage), step):
            if keys is not None:
                given = merged(given, self._paths(keys.recipe_keys(), outputs))
        if "rewards" in recipe_class.model_fields and "helpfulness" not in given["rewards"]:
            raise InputError(
                "rewards: no helpfulness model is named under [rewards], and no step before trains "
                "one (with [defaults.annotate], which says who compares, the default steps do)"
            )
        later = step_name(self._recipe.sft)
        if later and "reference" in recipe_class.model_fields and "reference" not in given:
            raise InputError(
                f"reference: sft is {later!r}, which a later step trains; name another"
            )
        try:
            return recipe_class.model_validate(given)
        except ValidationError as error:
            problems = (
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            )
            raise InputError("; ".join(problems)) from None

    def _from_before(self, index: int, outputs: Outputs) -> dict[str, Any]:
        """Keys that stages have in common, as the plan and the steps before `index` give them; a
        stage takes those that its recipe has."""
        recipe, step = self._recipe, self._planned[index]
        before = self._planned[:index]
        versions = [s.name for s in before if s.stage in POLICIES]
        sft = self._own("sft", outputs)
        newest = outputs.model(versions[-1]) if versions else sft
        given: dict[str, Any] = {
            "init": newest,
            "policy": newest,
            "reference": sft,
            "rewards": self._newest_rewards(before, outputs),
            "data": recipe.data,
            "validation": recipe.validation,
            "sampling": recipe.sampling.model_dump(),
            "parallel": recipe.parallel.model_dump(),
            "seed": derived_seed(recipe.seed, step.name),
        }
        if step.stage == "rejection":
            earlier = [s.name for s in before if s.stage == "rejection"]
            pooled = earlier if len(earlier) + 1 >= recipe.pool_from else []
            given["init"] = self._own("base" if recipe.base else "sft", outputs)
            given["earlier"] = [outputs.directory(name) for name in pooled]
        elif step.stage == "distill":
            selected = [outputs.directory(s.name) for s in before if s.stage == "rejection"]
            given |= {"data": selected[-1:] or None, "teacher": newest}
        elif step.stage == "reward":
            given |= self._comparisons(step, before, outputs)
        elif step.stage == "annotate":
            asked = [self._key(s, "prompts") or 0 for s in before if s.stage == "annotate"]
            given["asked"] = sum(asked)
            given["held_out"] = recipe.validation
        elif step.stage == "evaluate":
            known = {"SFT": sft} | {n: outputs.model(n) for n in versions}
            given["versions"] = {name: model for name, model in known.items() if model is not None}
            given["data"] = recipe.validation
        elif step.stage in OTHER_DATA:
            given |= {"data": None, "validation": None}
        if "sources" in STAGES[step.stage].recipe.model_fields and self._key(step, "sources"):
            given |= {"data": None, "mixed_in": None}  # in whose place they stand
        return {key: value for key, value in given.items() if value is not None}

    def _own(self, key: str, outputs: Outputs) -> Path | None:
        """The plan's `sft` or `base`; None where it says none, and in the steps up to the one that
        trains it."""
        folder: Path | None = getattr(self._recipe, key)
        name = step_name(folder)
        if name is None:
            return folder
        return outputs.model(name) if name in outputs.directories else None

    def _newest_rewards(self, before: list[PlanStep], outputs: Outputs) -> dict[str, Any]:
        """The newest reward model of each kind, and the threshold."""
        found = self._recipe.rewards.model_dump(exclude_none=True)
        for step in before:
            if step.stage == "reward":
                found[self._key(step, "kind")] = outputs.model(step.name)
        return found

    def _key(self, step: PlanStep, key: str) -> Any:
        """What the plan says of a key of a step's recipe, or the stage's default."""
        defaults = self._recipe.defaults.get(step.stage)
        given = (defaults.recipe_keys() if defaults else {}) | step.recipe_keys()
        return given.get(key, STAGES[step.stage].recipe.model_fields[key].default)

    def _comparisons(
        self, step: PlanStep, before: list[PlanStep], outputs: Outputs
    ) -> dict[str, Any]:
        """All comparisons collected so far, and the reward model that is replaced."""
        kind = self._key(step, "kind")
        batches = [outputs.directory(s.name) for s in before if s.stage == "annotate"]
        others = [other for other in self._recipe.kinds if other != kind]
        previous = self._newest_rewards(before, outputs)
        return {
            "init": self._own("sft", outputs),
            "data": [batch / file_name(kind, "training") for batch in batches] or None,
            "mixed_in": [batch / file_name(k, "training") for k in others for batch in batches],
            "validation": [batch / file_name(kind, "held_out") for batch in batches],
            "previous": previous.get(kind),
        }

    def _paths(self, value: Any, outputs: Outputs) -> Any:
        """`value` with every path that begins with @ as what it stands for."""
        if isinstance(value, dict):
            return {key: self._paths(item, outputs) for key, item in value.items()}
        if isinstance(value, list):
            return [self._paths(item, outputs) for item in value]
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        name, _, rest = value[1:].partition("/")
        if name in ("sft", "base"):
            folder = (self._recipe.base if name == "base" else None) or self._recipe.sft
            if (step := step_name(folder)) is not None:
                folder = outputs.model(step)
            return str(folder / rest)
        return str(outputs.directory(name) / rest if rest else outputs.model(name))


# Tables that say one thing together: another annotator is no addition to the first.
WHOLE = ("annotator", "judge", "versions")


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the keys of `above` in place of its own; likewise in tables, but in those of
    `WHOLE`."""
    result = dict(below)
    for key, value in above.items():
        tables = isinstance(value, dict) and isinstance(below.get(key), dict)
        result[key] = merged(below[key], value) if tables and key not in WHOLE else value
    return result
