"""What a run measures, by step: metrics.jsonl, TensorBoard, and W&B with WANDB_PROJECT set."""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama2rt import atomic


class Metrics:
    """The metrics of the run in `directory`; `manifest` is that of `run.manifest`."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self._directory, self._manifest = directory, manifest
        self._path = directory / "metrics.jsonl"
        self._tensorboard: Any = None
        self._wandb: Any = None

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Add one line to metrics.jsonl and its numbers to TensorBoard (and W&B if asked)."""
        line = json.dumps({"step": step, **metrics})
        with open(self._path, "a") as stream:
            stream.write(line + "\n")
        if self._tensorboard is None:
            # Here and not above: this import takes seconds, which short-lived commands do not have.
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a killed run wrote beyond its last checkpoint.
            self._tensorboard = SummaryWriter(self._directory / "tensorboard", purge_step=step)
            self._wandb = _start_wandb(self._directory, self._manifest)
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def truncate(self, step: int) -> None:
        """Drop lines after `step` (and one that a kill cut short), so that no step is twice."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break
        atomic.write(self._path, "".join(kept))

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(directory: Path, manifest: Mapping[str, Any]) -> Any:
    project = os.environ.get("WANDB_PROJECT")
    if not project or find_spec("wandb") is None:
        return None
    import wandb

    identity = hashlib.sha256(f"{directory.resolve()}{manifest['started']}".encode()).hexdigest()
    return wandb.init(
        project=project,
        name=directory.name,
        id=identity[:16],
        resume="allow",
        dir=directory,
        config=manifest["recipe"],
    )
