"""The alignment tax: what each version of a plan has lost or won against SFT, task by task."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2rt.checkpoint import load
from llama2rt.errors import InputError
from llama2rt.evaluate.intervals import paired
from llama2rt.model import Llama

logger = logging.getLogger("llama2rt.evaluate.harness")

BASELINE = "sft"
"""the step whose model the others are held against"""


def model_folders(path: Path) -> dict[str, Path]:
    """Language models by name: the folder or GGUF file `path` itself, a run's model, or, of a
    plan's run directory, those of its steps in the order in which they ran, from SFT on."""
    if path.is_file() or (path / "config.json").is_file() or (path / "params.json").is_file():
        return {path.name: path}
    if (path / "model").is_dir():
        return {path.name: path / "model"}
    steps = _steps(path)
    found = {}
    for name in steps:
        folder = path / name / "model"
        if folder.is_dir():
            if isinstance(load(folder, "meta")[0], Llama):
                found[name] = folder
            else:
                logger.info("%s: a reward model, left out", folder)
    if not found:
        raise InputError(f"{path}: neither a model folder nor the run directory of a plan")
    names = list(found)
    begin = names.index(BASELINE) if BASELINE in names else 0
    return {name: found[name] for name in names[begin:]}


def _steps(path: Path) -> list[str]:
    phases = path / "phases.json"
    if not phases.is_file():
        return []
    try:
        return list(json.loads(phases.read_text())["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{phases}: not what a plan writes ({error!r})") from None


def compare(summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each task, from `runs.summary` of each version: `task`, `metric`, `shots` and
    `versions`, each with its `value`, `low`, `high`, `calibration` and, but for the first version,
    the `difference` from it on the same documents, with its paired bootstrap interval."""
    baseline, *_ = summaries
    rows = []
    for task, first in summaries[baseline].items():
        versions = {}
        for name, tasks in summaries.items():
            own = tasks[task]
            versions[name] = {
                key: own[key] for key in ("value", "low", "high", "calibration") if key in own
            }
            if name != baseline and "values" in own and "values" in first:
                numbers = sorted(first["values"])
                versions[name]["difference"] = paired(
                    [own["values"][n] for n in numbers], [first["values"][n] for n in numbers]
                )._asdict()
        about = {key: first[key] for key in ("metric", "shots", "samples", "higher_is_better")}
        rows.append({"task": task, **about, "versions": versions})
    return rows
