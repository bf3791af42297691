"""Checkpoints that are either complete or invisible.

A checkpoint is a folder `step-N` that appears by one rename, after every byte of it and of its
index has reached the disk. The index lists each file with its size and SHA-256, so that a folder
cut short or altered later is recognised, named and passed over for the one before it. Tensors are
spread over safetensors shards of bounded size; the index says nothing about who wrote a shard:
several processes each contribute their own (`parallel.group_store`), and one process reads those
too. `train` puts weights, moments and generators here.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama2rt import atomic

SHARD_BYTES = 4 << 30
INDEX = "index.json"
RANKS = "ranks"
"""key of the index of a checkpoint that several ranks have written: how many"""
DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""what reading a checkpoint raises that is not as it was written"""


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
            raise self.not_written(step, str(error)) from error
        self.drop_all_but_newest(step)
        return final

    def not_written(self, step: int, reason: str) -> CheckpointError:
        """The error that says why `step` could not be saved, and what is left."""
        kept = self.steps()
        safe = f"step-{kept[-1]} is still the last checkpoint" if kept else "none exists yet"
        return CheckpointError(
            f"{self.path(step)}: this checkpoint could not be written ({reason}); {safe}. Free "
            "some space or fix the folder's permissions, then continue with --resume."
        )

    def drop_all_but_newest(self, step: int) -> None:
        """Remove what `step`, just written, makes superfluous."""
        # Newer steps belong to a future this run has left: it resumed from before them because
        # they were damaged. Kept, they would push good checkpoints out.
        stale = [other for other in self.steps() if other > step]
        older = [other for other in self.steps() if other <= step]
        for other in stale + older[: -self.keep]:
            shutil.rmtree(self.path(other), ignore_errors=True)

    def check(self) -> None:
        """To be called between two steps: raises what a write in the background has met. Here
        `save` has raised it."""

    def wait(self) -> None:
        """Return, or raise, once nothing is written in the background any more: here at once."""

    def latest(
        self, into: Mapping[str, Tensor] | None = None
    ) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact checkpoint as (step, tensors, state); None where there is none.

        `into`: the tensors that are to be restored, by name. A group of ranks needs them to know
        which parts are each one's; one process may leave them out, and gets new CPU tensors.

        A damaged one is named in a warning and the one before it used. Raises CheckpointError when
        there are checkpoints and all of them are damaged: starting over in silence would throw
        away a run that someone can perhaps still rescue.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.path(step)
            try:
                index = read_index(folder)
                for name, expected in index["files"].items():
                    check_file(folder / name, expected)
                return step, _read_tensors(folder, index), index["state"]
            except DAMAGE as error:
                warn_of_damage(folder, error)
        if steps:
            raise self.all_damaged(steps)
        return None

    def all_damaged(self, steps: list[int]) -> CheckpointError:
        """The error that says that none of `steps` can be read."""
        return CheckpointError(
            f"{self.directory}: every checkpoint is damaged "
            f"({', '.join(f'step-{step}' for step in steps)}); "
            "move the folder away to start this run anew"
        )


def warn_of_damage(folder: Path, reason: Exception | str) -> None:
    """Name a checkpoint that is passed over, to whoever called `latest`."""
    warnings.warn(f"{folder}: damaged checkpoint refused ({reason})", RuntimeWarning, stacklevel=3)


def _read_tensors(folder: Path, index: dict[str, Any]) -> dict[str, Tensor]:
    if RANKS in index:
        # Here, because torch.distributed.checkpoint takes a second to import.
        from llama2rt.checkpoint.sharded import Parts

        return Parts(folder, index["files"]).whole()
    tensors: dict[str, Tensor] = {}
    for name in index["files"]:
        tensors.update(load_file(folder / name))
    return tensors


def _write_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    files = {}
    for number, shard in enumerate(_shards(tensors)):
        path = folder / f"tensors-{number:05d}.safetensors"
        save_file(shard, path)
        files[path.name] = described(path)
    write_index(folder, {"step": step, "files": files, "state": state})


def described(path: Path) -> dict[str, Any]:
    """What the index says of a file just written, once it has reached the disk."""
    atomic.sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Complete a folder whose files are there."""
    body = json.dumps(index, indent=1)
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


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint, checked against its own digest; raises one of DAMAGE."""
    body, _, digest = (folder / INDEX).read_text().rpartition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ValueError(f"{INDEX} does not match its own digest")
    return json.loads(body)


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """Raise one of DAMAGE where a file is not what the index says of it."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, expected {expected['bytes']}")
    if _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path.name} does not match its SHA-256")


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
