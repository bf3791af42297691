"""Checkpoints that are either complete or invisible.

A checkpoint is a folder `step-N` that appears by one rename, after every byte of it and of its
index has reached the disk. The index lists each file with its size and SHA-256, so that a folder
cut short or altered later is recognised, named and passed over for the one before it. Tensors are
spread over safetensors shards of bounded size; the index says nothing about who wrote a shard, so
several processes may each contribute their own. `train` puts weights, moments and generators here.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama2rt import atomic

SHARD_BYTES = 4 << 30
INDEX = "index.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be trusted."""


class Store:
    """The checkpoints of one run: `directory/step-N` for the newest `keep` steps."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint folder, ascending (damaged ones included)."""
        if not self.directory.is_dir():
            return []
        names = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write `step-{step}` atomically, then drop all but the newest `keep` checkpoints.

        `tensors`: any shapes and dtypes, none sharing storage with another; `state`: what json
        can hold (floats come back bit for bit). Raises CheckpointError when the disk is full or the
        folder cannot be written; every earlier checkpoint is then still there.
        """
        final, temporary = self.path(step), self.directory / f"tmp-{step}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
            _write_checkpoint(temporary, step, tensors, state)
            if final.exists():
                # A rename cannot replace a full folder. What stands here is a damaged step that a
                # resumed run has now reached again, or the same bits saved twice.
                shutil.rmtree(final)
            temporary.rename(final)
            atomic.sync(self.directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            safe = f"step-{kept[-1]} is still the last checkpoint" if kept else "none exists yet"
            raise CheckpointError(
                f"{final}: this checkpoint could not be written ({error}); {safe}. Free some space "
                "or fix the folder's permissions, then continue with --resume."
            ) from error
        # Newer steps belong to a future this run has left: it resumed from before them because
        # they were damaged. Kept, they would push good checkpoints out.
        stale = [other for other in self.steps() if other > step]
        older = [other for other in self.steps() if other <= step]
        for other in stale + older[: -self.keep]:
            shutil.rmtree(self.path(other), ignore_errors=True)
        return final

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact checkpoint as (step, CPU tensors, state); None where there is none.

        A damaged one is named in a warning and the one before it used. Raises CheckpointError when
        there are checkpoints and all of them are damaged: starting over in silence would throw
        away a run that someone can perhaps still rescue.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.path(step)
            try:
                index = _verified_index(folder)
                tensors: dict[str, Tensor] = {}
                for name in index["files"]:
                    tensors.update(load_file(folder / name))
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                warnings.warn(
                    f"{folder}: damaged checkpoint refused ({error})", RuntimeWarning, stacklevel=2
                )
                continue
            return step, tensors, index["state"]
        if steps:
            raise CheckpointError(
                f"{self.directory}: every checkpoint is damaged "
                f"({', '.join(f'step-{step}' for step in steps)}); "
                "move the folder away to start this run anew"
            )
        return None


def _write_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    files = {}
    for number, shard in enumerate(_shards(tensors)):
        path = folder / f"tensors-{number:05d}.safetensors"
        save_file(shard, path)
        atomic.sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    body = json.dumps({"step": step, "files": files, "state": state}, indent=1)
    # The index guards the shards; its own digest guards the index (state included).
    digest = hashlib.sha256(body.encode()).hexdigest()
    with open(folder / INDEX, "w") as stream:
        stream.write(f"{body}\n{digest}")
        stream.flush()
        os.fsync(stream.fileno())
    atomic.sync(folder)


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    return shards


def _verified_index(folder: Path) -> dict[str, Any]:
    body, _, digest = (folder / INDEX).read_text().rpartition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ValueError(f"{INDEX} does not match its own digest")
    index = json.loads(body)
    for name, expected in index["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            )
        if _sha256(path) != expected["sha256"]:
            raise ValueError(f"{name} does not match its SHA-256")
    return index


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` before each name: those of two owners can lie in one file."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unprefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
