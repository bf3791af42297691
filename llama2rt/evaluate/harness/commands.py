"""`llama2rt evaluate MODEL --tasks`: the harness's tasks on a model, or on a plan's versions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2rt.errors import InputError
from llama2rt.evaluate.harness.runs import (
    RunOptions,
    require_language_model,
    run_tasks,
    summary,
)
from llama2rt.evaluate.harness.tasks import load_tasks
from llama2rt.evaluate.harness.versions import compare, model_folders


def evaluate_tasks(
    path: Path,
    names: Sequence[str],
    shots: int | None = None,
    options: RunOptions | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """`models` (name -> folder), `tasks` (a row each: `versions.compare`) and `results` (name ->
    the harness's own figures).

    `path`: a model folder, a run, or a plan's run directory, of which every version from SFT on is
    evaluated. `names` as `load_tasks` takes them. With `out`, the harness's files of each model lie
    below it. InputError before any weights are read, as `load_tasks`, and for what is no model.
    """
    options = options or RunOptions()
    if shots is not None and shots < 0:
        raise InputError(f"shots: expected at least 0, got {shots}")
    folders = model_folders(path)
    for folder in folders.values():
        require_language_model(folder)
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder")
    if options.run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # which the metric that runs code asks as it loads
    tasks = load_tasks(names, shots, run_unsafe_code=options.run_unsafe_code)
    summaries, results = {}, {}
    for name, folder in folders.items():
        found = run_tasks(folder, tasks, options, out)
        summaries[name], results[name] = summary(found), found["results"]
    return {
        "models": {name: str(folder) for name, folder in folders.items()},
        "tasks": compare(summaries),
        "results": results,
    }


def describe(result: Mapping[str, Any]) -> str:
    """What `evaluate_tasks` found, as lines for a terminal."""
    lines = []
    for row in result["tasks"]:
        lines.append(f"{row['task']}: {row['metric']}, {row['shots']} shots, {row['samples']}")
        for name, found in row["versions"].items():
            line = f"  {name:<22}{found['value']:.4f}"
            if "low" in found:
                line += f" [{found['low']:.4f}, {found['high']:.4f}]"
            if difference := found.get("difference"):
                line += (
                    f"  {difference['mean']:+.4f} "
                    f"[{difference['low']:+.4f}, {difference['high']:+.4f}]"
                )
            if "calibration" in found:
                line += f"  calibration error {found['calibration']:.3f}"
            lines.append(line)
    return "\n".join(lines)
