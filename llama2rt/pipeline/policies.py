"""Studies of policies: variants of how one is trained, each from several seeds, compared on the
same held-out prompts in one table (RLHF Workflow, arXiv 2405.07863, Table 6: the length penalty,
the reward model).

A policy is a stage with the keys that differ. All are scored by the same reward models, whatever
each was trained with, and read by the judge, where there is one, once.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from llama2rt import atomic, report
from llama2rt.annotate.options import named_function
from llama2rt.errors import InputError
from llama2rt.evaluate import intervals, win_rates
from llama2rt.parallel import on_main
from llama2rt.pipeline.iterate import POLICIES, merged
from llama2rt.pipeline.keys import PlanStep
from llama2rt.pipeline.plan import Outputs, Resolved, Step
from llama2rt.pipeline.run import Clock, prepare
from llama2rt.pipeline.run import run as run_plan
from llama2rt.report import studies
from llama2rt.run import Recipe, Run, manifest
from llama2rt.run.unfinished import first_problem
from llama2rt.stages import STAGES, evaluate, loading
from llama2rt.stages.evaluate import Answers, JudgeOptions
from llama2rt.stages.pairs import kept_sums

if TYPE_CHECKING:
    from llama2rt.pipeline.study import StudyRecipe

logger = logging.getLogger("llama2rt.pipeline.policies")

TRAINED = (*POLICIES, "sft")
"""stages that leave a policy"""
EVALUATION = "evaluate"


def steps(recipe: "StudyRecipe") -> list[Step]:
    """The trainings, then the answers of all that they leave. InputError naming the policy whose
    keys are wrong."""
    found = []
    names: dict[str, str] = {}
    for policy in recipe.policies:
        if policy.stage not in TRAINED:
            raise InputError(
                f"policies: {policy.name}: {policy.stage} leaves no policy: expected one of "
                f"{', '.join(TRAINED)}"
            )
        for seed in recipe.seeds:
            trained = _recipe(recipe, policy, seed)
            name = f"{policy.name}-seed-{seed}"
            names[label(policy, seed)] = name
            found.append(_step(name, policy.stage, trained))
    keys = _defaults(recipe, EVALUATION)
    if missing := {"reference", "rewards", "data"} - set(keys):
        raise InputError(
            f"defaults.evaluate: missing {', '.join(sorted(missing))}: policies are compared by it"
        )
    # The judge is asked here, once, for every answer by itself.
    keys = {key: value for key, value in keys.items() if key != "judge"}
    known = keys.get("versions", {})
    if taken := set(known) & {*names, *(policy.name for policy in recipe.policies)}:
        raise InputError(f"defaults.evaluate.versions: {min(taken)!r} is a policy of this study")

    def compared(outputs: Outputs) -> Recipe:
        versions = known | {name: str(outputs.model(step)) for name, step in names.items()}
        return _validated(EVALUATION, keys | {"versions": versions}, "defaults.evaluate")

    # More policies are compared anew, beside what was.
    return [*found, Step(f"answers-of-{len(known) + len(names)}", EVALUATION, compared)]


def _step(name: str, stage: str, recipe: Recipe) -> Step:
    return Step(name, stage, lambda outputs: recipe)


def label(policy: PlanStep, seed: int) -> str:
    """What one training's model is called among the versions that are compared."""
    return f"{policy.name}, seed {seed}"


def _defaults(recipe: "StudyRecipe", stage: str) -> dict[str, Any]:
    table = recipe.defaults.get(stage)
    return table.recipe_keys() if table is not None else {}


def _recipe(recipe: "StudyRecipe", policy: PlanStep, seed: int) -> Recipe:
    keys = policy.recipe_keys()
    if "seed" in keys:
        raise InputError(f"policies: {policy.name}: seed: seeds of the study says it")
    given = merged(_defaults(recipe, policy.stage), keys) | {"seed": seed}
    return _validated(policy.stage, given, f"policies: {policy.name}")


def _validated(stage: str, given: Mapping[str, Any], where: str) -> Recipe:
    kind = STAGES[stage].recipe
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error.errors(), kind)}") from None


def run(recipe: "StudyRecipe", directory: Path, *, resume: bool = False) -> Path:
    """Train, sample, compare into report.json, report.html and tables.md; returns the directory."""
    judge = _judge(recipe)
    plan = prepare(steps(recipe), directory)
    files = {} if judge is None else loading.file_inputs(judge)
    study = Run.open(directory, recipe, inputs=files, resume=resume)
    if study.complete:
        return study.directory
    begun = sum(manifest.is_complete(step.directory) for step in plan)
    logger.info("%d trainings and a comparison, %d of them done", len(plan) - 1, begun)
    run_plan(plan, Clock(directory / "phases.json"))
    numbers = on_main(lambda: measure(recipe, plan[-1], directory))
    on_main(lambda: atomic.write(directory / "tables.md", studies.markdown(numbers)))
    report.finish(study, numbers)
    return study.directory


def _judge(recipe: "StudyRecipe") -> JudgeOptions | None:
    given = _defaults(recipe, EVALUATION).get("judge")
    if given is None:
        return None
    judge = JudgeOptions.model_validate(given)
    named_function(judge.python, "defaults.evaluate.judge.python")
    return judge


def measure(recipe: "StudyRecipe", compared: Resolved, directory: Path) -> dict[str, Any]:
    """The report's numbers: `policies`, a row each in order, and what they were measured by."""
    answers = evaluate.read_answers(compared.directory)
    worth = worths(_judge(recipe), answers, directory / "scores" / "judge.json")
    divergence = {
        row["name"]: row["kl"]
        for row in manifest.read(compared.directory / manifest.FILE)["summary"]["versions"]
    }
    of_policy = {
        policy.name: [label(policy, s) for s in recipe.seeds] for policy in recipe.policies
    }
    trained = {name for names in of_policy.values() for name in names}
    rows = {name: [name] for name in answers if name not in trained} | of_policy
    first = recipe.policies[0].name
    return {
        "study": {"seeds": list(recipe.seeds), "first": first, "judged": worth is not None},
        "policies": [
            _row(name, names, rows[first], answers, worth)
            | {"kl": float(np.mean([divergence[n]["k1"]["mean"] for n in names]))}
            for name, names in rows.items()
        ],
    }


def worths(
    judge: JudgeOptions | None, answers: Answers, path: Path
) -> dict[str, np.ndarray] | None:
    """The judge's worth of every answer, [prompts, samples] by version, kept in the file at `path`;
    None without a judge."""
    if judge is None:
        return None
    texts = {
        name: [[(r.prompt.messages, r.text) for r in group] for group in groups]
        for name, groups in answers.items()
    }

    def compute() -> dict[str, np.ndarray]:
        asked = named_function(judge.python, "judge.python")(*judge.files)
        return {
            name: np.array([asked(r.prompt, r.text) for group in groups for r in group], np.float32)
            for name, groups in answers.items()
        }

    files = [str(path) for path in judge.files]
    found = kept_sums(path, [judge.python, files, texts], compute)
    return {name: found[name].reshape(len(groups), -1) for name, groups in answers.items()}


def _row(
    name: str,
    versions: Sequence[str],
    first: Sequence[str],
    answers: Answers,
    worth: Mapping[str, np.ndarray] | None,
) -> dict[str, Any]:
    """One policy: estimates over prompts, of each the mean over seeds and samples, each seed's
    mean, and against the `first` policy the paired difference and the win rate."""

    def table(versions: Sequence[str], what: str) -> np.ndarray:
        """[seeds, prompts, samples]"""
        if what == "worth":
            assert worth is not None
            return np.stack([worth[version] for version in versions])
        read = {
            "score": lambda r: 1 / (1 + np.exp(-r.reward)),
            "characters": lambda r: len(r.text),
            "tokens": lambda r: len(r.tokens),
            "cut": lambda r: not r.finished,
        }[what]
        return np.array([[[read(r) for r in g] for g in answers[v]] for v in versions], np.float64)

    found: dict[str, Any] = {"name": name}
    measures = ["score", "characters", "tokens", "cut", *(["worth"] if worth is not None else [])]
    for what in measures:
        own, theirs = table(versions, what), table(first, what)
        by_prompt, before = own.mean(axis=(0, 2)), theirs.mean(axis=(0, 2))
        found[what] = intervals.bootstrap(by_prompt)._asdict() | {
            "by_seed": own.mean(axis=(1, 2)).tolist(),
            "difference": intervals.paired(by_prompt, before)._asdict(),
        }
    by = "score" if worth is None else "worth"
    own, theirs = (np.concatenate(table(names, by), axis=1) for names in (versions, first))
    found["win_rate"] = win_rates.win_rate(list(own), list(theirs)).rate._asdict()
    return found
