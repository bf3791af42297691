"""The main job, top to bottom: data, the plan's steps, what the judge says of them, a report.

Each step is the library's own stage, run into its folder below the job's directory, so every one of
them can be inspected, resumed or repeated by its verb. What is here is what no stage does: write
the data, and let the judge read the versions at the end.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2rt.parallel import by_main, on_main
from llama2rt.pipeline.plan import Resolved
from llama2rt.pipeline.run import Clock, prepare
from llama2rt.pipeline.run import run as run_plan
from llama2rt.quickstart import data, evaluation, page, studies
from llama2rt.quickstart.plan import KINDS, QuickstartPlan
from llama2rt.quickstart.recipe import QuickstartRecipe
from llama2rt.report.versions import newest_batch
from llama2rt.run import Run, hash_path, manifest
from llama2rt.stages.evaluate import read_answers

# What the evaluate step measured and the report shows.
COMPARED = (
    "win_rates",
    "reward_win_rates",
    "best_of",
    "length_correlation",
    "reward_against_judge",
)


def run(recipe: QuickstartRecipe, directory: Path, *, resume: bool = False) -> dict[str, Any]:
    """Do the whole job, or what is left of it; returns the numbers of report.json. Of several ranks
    all walk the plan, and rank 0 writes what it starts from and what it ends with."""
    # Stages compare the paths in their recipes when they resume: let them not depend on where the
    # command was given.
    directory = directory.resolve()
    job = Run.open(directory, recipe, resume=resume)
    if job.complete:
        return on_main(lambda: read_report(directory))
    clock = Clock(directory / "phases.json")

    with clock.phase("data", "corpus, dialogues, prompts, answer keys"):
        files = prepare_data(recipe, directory)
    keys = data.keys_path(directory)
    steps = QuickstartPlan(recipe, files, directory / "init", keys).steps()
    plan = prepare(steps, directory)
    run_plan(plan, clock)
    studies.run(recipe, directory, clock)
    with clock.phase("report", "the judge's verdicts, figures and tables"):
        numbers = write_report(recipe, directory, plan, clock)
    job.finish(seconds=numbers["seconds"], data=on_main(lambda: data_hashes(directory)))
    return on_main(lambda: read_report(directory))


@by_main
def prepare_data(recipe: QuickstartRecipe, directory: Path) -> dict[str, Path]:
    """Generated records by what they are for; beside them a tokenizer and random weights."""
    files = data.write(recipe, directory)
    data.initialise(recipe, files["documents"], files["dialogues"], directory)
    return files


def data_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the generated files, by their paths in `directory`."""
    return {
        str(path.relative_to(directory)): hash_path(path)
        for folder in ("data", "judge")
        for path in sorted((directory / folder).iterdir())
    }


@by_main
def write_report(
    recipe: QuickstartRecipe, directory: Path, plan: Sequence[Resolved], clock: Clock
) -> dict[str, Any]:
    """report.html and report.json; their numbers."""
    found = read_summary(directory / "evaluate")
    answers = read_answers(directory / "evaluate")
    reward_models = {
        kind: read_summary(directory / f"reward-{kind}-{recipe.batches}") for kind in KINDS
    }
    numbers = {
        "seconds": clock.total(),
        "peak_memory_bytes": clock.peak_memory_bytes(),
        "seed": recipe.seed,
        "parameters": recipe.shape.parameters,
        "phases": dict(clock.seconds),
        "reward_models": reward_models,
        "drift": {
            kind: newest_batch(model["drift"])
            for kind, model in reward_models.items()
            if "drift" in model
        },
        "studies": {
            title: read_summary(directory / folder) for title, folder in studies.FOLDERS.items()
        },
        **{key: found[key] for key in COMPARED},
        **evaluation.judged(answers, found["versions"], data.read_keys(data.keys_path(directory))),
    }
    page.write(directory, plan, numbers)
    return numbers


def read_report(directory: Path) -> dict[str, Any]:
    """The numbers of a run's report.json."""
    numbers: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return numbers


def read_summary(directory: Path) -> dict[str, Any]:
    """What a complete run says of itself in its manifest, which is written before its report."""
    summary: dict[str, Any] = manifest.read(directory / manifest.FILE)["summary"]
    return summary
