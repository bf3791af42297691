"""A run directory: what was asked, what went in, what was measured, where to continue.

    recipe.toml      the resolved recipe
    manifest.json    versions, recipe hash, hashes of every input and model, parent runs
    metrics.jsonl    one line per logged step (also TensorBoard; W&B with WANDB_PROJECT set)
    checkpoints/     step-N, complete or absent
    model/           the final weights, readable by llama2rt.load
    samples/         what the stage generated

Left out: any knowledge of stages. They open a run, read ``complete``, and finish it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import BaseModel

import llama2rt
from llama2rt import atomic
from llama2rt.checkpoint.store import Store
from llama2rt.errors import InputError
from llama2rt.train.options import Change, Recipe

logger = logging.getLogger("llama2rt.train.run")

_MANIFEST = "manifest.json"
_RECIPE = "recipe.toml"
_LOCK = ".lock"

# Locked run directories of this process: path of the lock -> descriptor.
_locks: dict[Path, int] = {}


class Run:
    """One stage's directory. Make it with `Run.open`; leave it with `finish`."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.store = Store(directory / "checkpoints")
        self._tensorboard: Any = None
        self._wandb: Any = None

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        recipe: BaseModel,
        *,
        inputs: Mapping[str, str | os.PathLike[str]] | None = None,
        parents: Iterable[str | os.PathLike[str]] = (),
        resume: bool = False,
    ) -> Self:
        """Start a run in an empty or new directory, or continue the one that is there.

        ``inputs`` are files or folders by name, hashed into the manifest; ``parents`` are run
        directories this one builds on. A directory in use needs ``resume``, and then every input
        must be what it was: a run continued on other data is another run. So must the recipe, but
        for changes that lead to the result this recipe would have had from the start
        (`Recipe.change`, and another spelling of the same path): these are said, and recorded. A
        complete run that is to be longer goes on. Raises InputError naming what differs, and while
        another process is at work in the directory.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory}: expected a directory, found a file")
        resolved = recipe.model_dump(mode="json", exclude_none=True)
        hashes = {}
        for name, path in (inputs or {}).items():
            hashes[name] = {"path": os.fspath(path), "sha256": hash_path(Path(path))}
        if (directory / _MANIFEST).exists():
            if not resume:
                raise InputError(
                    f"{directory}: holds a run already; continue it with --resume or choose "
                    "another --out"
                )
            manifest = _read_manifest(directory / _MANIFEST)
            changes, longer = _changes(directory, manifest, recipe, resolved)
            _check_inputs(directory, manifest, hashes)
            if longer or not manifest["complete"]:
                _lock(directory)
                if changes:
                    manifest = _resumed(manifest, resolved, changes)
                    _write(directory, manifest)
            return cls(directory, manifest)
        # A process killed while starting leaves at most recipe.toml and a half-written (hidden)
        # file of its own: nothing to protect.
        if {path.name for path in directory.glob("[!.]*")} - {_RECIPE}:
            raise InputError(f"{directory}: not empty, and no run of llama2rt's; choose another")
        manifest = {
            "recipe": resolved,
            "inputs": hashes,
            "parents": [_parent(Path(parent)) for parent in parents],
            "seed": resolved.get("seed"),
            "versions": _versions(),
            "started": _now(),
            "complete": False,
            **_here(),
        }
        directory.mkdir(parents=True, exist_ok=True)
        _lock(directory)
        _write(directory, manifest)
        return cls(directory, manifest)

    @property
    def complete(self) -> bool:
        """True once `finish` has been called: the stage has nothing left to do."""
        return bool(self.manifest["complete"])

    @property
    def model_directory(self) -> Path:
        return self.directory / "model"

    @property
    def samples_directory(self) -> Path:
        return self.directory / "samples"

    def log(self, step: int, **metrics: float | int | str) -> None:
        """Add one line to metrics.jsonl and its numbers to TensorBoard (and W&B if asked)."""
        line = json.dumps({"step": step, **metrics})
        with open(self.directory / "metrics.jsonl", "a") as stream:
            stream.write(line + "\n")
        if self._tensorboard is None:
            # Here and not above: this import takes seconds, which short-lived commands do not have.
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a killed run wrote beyond its last checkpoint.
            self._tensorboard = SummaryWriter(self.directory / "tensorboard", purge_step=step)
            self._wandb = _start_wandb(self.directory, self.manifest)
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def truncate_metrics(self, step: int) -> None:
        """Drop lines after ``step`` (and one that a kill cut short), so that no step is twice."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break
        atomic.write(path, "".join(kept))

    def finish(self, **summary: Any) -> None:
        """Mark the run complete, with what is worth knowing about it at a glance."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self.manifest = {
            **self.manifest,
            "complete": True,
            "finished": _now(),
            "summary": summary,
        }
        atomic.write(self.directory / _MANIFEST, json.dumps(self.manifest, indent=2) + "\n")
        _unlock(self.directory)


def abandon(directory: Path) -> None:
    """Remove a run directory in which nothing has happened yet, and such ones of runs inside it.

    For a command whose input turned out bad: the same command with better input finds its place
    free. A directory that holds anything but a recipe and a manifest stays.
    """
    for child in directory.glob("*"):
        if (child / _MANIFEST).is_file():
            abandon(child)
    begun = {_MANIFEST, _RECIPE, _LOCK}
    if directory.is_dir() and {path.name for path in directory.iterdir()} <= begun:
        _unlock(directory)
        for name in begun:
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of all files below a folder."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)} {hash_path(file)}\n".encode())
        return digest.hexdigest()
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _lock(directory: Path) -> None:
    """Hold the directory for this process until it finishes the run or ends, however it ends."""
    path = directory.resolve() / _LOCK
    if path in _locks:
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(_locks[path]).st_ino == path.stat().st_ino:
                return
        os.close(_locks.pop(path))  # the directory was deleted, and made anew, since
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise InputError(
                f"{directory}: another process is at work in it; wait for it or stop it first"
            ) from None
        # A file system without locks: nothing can be held there, and nothing is lost by it.
    _locks[path] = descriptor


def _unlock(directory: Path) -> None:
    path = directory.resolve() / _LOCK
    if path in _locks:
        path.unlink(missing_ok=True)
        os.close(_locks.pop(path))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    for key in ("recipe", "inputs", "complete"):
        if key not in manifest:
            raise InputError(f"{path}: not a manifest of this program: no {key!r}")
    return manifest


def _check_inputs(directory: Path, manifest: dict[str, Any], hashes: dict[str, Any]) -> None:
    for name in sorted(manifest["inputs"].keys() | hashes.keys()):
        old, new = manifest["inputs"].get(name, {}), hashes.get(name, {})
        if old.get("sha256") != new.get("sha256"):
            raise InputError(
                f"{new.get('path', old.get('path'))}: {name} has changed since the run in "
                f"{directory} started; restore it or start anew with another --out"
            )


def _changes(
    directory: Path, manifest: dict[str, Any], recipe: BaseModel, resolved: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """(what differs from the recipe that the run began with, by key, from what to what; whether it
    makes the run longer). InputError for a difference that would change the result."""
    then, now = _flatten(manifest["recipe"]), _flatten(resolved)
    where = manifest.get("working_directory", os.getcwd())
    changes: dict[str, Any] = {}
    longer = False
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if before == after:
            continue
        change: Change = "refused"
        if _is_path(recipe, key) and _same_file(where, before, after):
            change = "neutral"
        elif isinstance(recipe, Recipe):
            change = recipe.change(key, then)
        if change == "refused":
            raise InputError(
                f"{directory}: started with {key} = {before!r}, asked to resume with "
                f"{after!r}; use the same recipe or another --out"
            )
        changes[key] = {"from": before, "to": after}
        longer = longer or change == "longer"
    if changes and (longer or not manifest["complete"]):
        said = ", ".join(f"{key} = {c['to']!r} (was {c['from']!r})" for key, c in changes.items())
        logger.warning("%s: resumed with %s; no step so far would be another", directory, said)
    return changes, longer


def _resumed(
    manifest: dict[str, Any], resolved: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a run that goes on with another recipe; what was changed is kept in it."""
    kept = {key: value for key, value in manifest.items() if key not in ("finished", "summary")}
    history = [*manifest.get("resumed", []), {"at": _now(), "changes": changes}]
    return {**kept, "recipe": resolved, "complete": False, "resumed": history, **_here()}


def _is_path(recipe: BaseModel, key: str) -> bool:
    """Whether the value at a dotted key is a path (or text below a table of any keys, which a
    stage may read as one)."""
    value: Any = recipe
    free = False
    for part in key.split("."):
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, Mapping):
            value, free = value.get(part), True
        else:
            value = getattr(value, part, None)
    return isinstance(value, os.PathLike) or (free and isinstance(value, str))


def _same_file(directory_before: str, before: Any, after: Any) -> bool:
    if not (isinstance(before, str) and isinstance(after, str)):
        return False
    path = os.path.realpath(after)
    return os.path.realpath(os.path.join(directory_before, before)) == path and os.path.exists(path)


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted key; the items of a list by their number."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= _flatten(item, f"{key}.{name}" if key else str(name))
    return flat


def _here() -> dict[str, str]:
    """What a relative path in the recipe is relative to."""
    return {"working_directory": os.getcwd()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _write(directory: Path, manifest: dict[str, Any]) -> None:
    atomic.write(directory / _RECIPE, tomli_w.dumps(manifest["recipe"]))
    atomic.write(directory / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _parent(directory: Path) -> dict[str, str]:
    path = directory / _MANIFEST
    return {"path": os.fspath(directory), "manifest_sha256": hash_path(path)}


def _versions() -> dict[str, str]:
    versions = {"llama2rt": llama2rt.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "sentencepiece"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def _start_wandb(directory: Path, manifest: dict[str, Any]) -> Any:
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
