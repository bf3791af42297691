"""What each step of a plan read and left, by its SHA-256: a version's data and its model.

A step's own manifest hashes what it reads; what it leaves is hashed here, so that the plan's
manifest alone says which data made which model, and whether two runs of a plan came to the same
models. Their samples' hashes differ by folder: a sample names its policy by path.
Left out: logs, reports and checkpoints, which hold times.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2rt.pipeline.plan import Resolved
from llama2rt.run import hash_path, manifest

# Below a step's run directory: weights, samples, and records of its own making. A stage may train
# several models (students, iterations), each in a folder of its own.
LEFT = ("model", "adapter", "samples", "*.jsonl", "*/model", "*/samples", "*/*.jsonl")
# `samples` is hashed as a whole, and so is what a model's folder holds.
WITHIN = ("model", "adapter", "samples", "checkpoints")


def of(plan: Sequence[Resolved]) -> list[dict[str, Any]]:
    """A row for each step of a plan that is done: {name, stage, read, left}, the last two from
    names to hashes: keys of the step's recipe, and paths in its run directory."""
    return [
        {
            "name": step.name,
            "stage": step.stage.name,
            "read": {
                key: given["sha256"]
                for key, given in manifest.read(step.directory / manifest.FILE)["inputs"].items()
            },
            "left": {
                str(path.relative_to(step.directory)): hash_path(path)
                for path in left(step.directory)
            },
        }
        for step in plan
    ]


def left(directory: Path) -> list[Path]:
    """The models, samples and records that a run has left."""
    return sorted(
        path
        for pattern in LEFT
        for path in directory.glob(pattern)
        if path.name != "metrics.jsonl" and path.parent.name not in WITHIN
    )
