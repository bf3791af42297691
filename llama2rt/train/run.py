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
        directories this one builds on. A directory in use needs ``resume``, and then the recipe and
        every input must be what they were: a run continued on other data is another run. Raises
        InputError naming what differs, and while another process is at work in the directory.
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
            _check_same(directory, manifest, resolved, hashes)
            if not manifest["complete"]:
                _lock(directory)
            return cls(directory, manifest)
        # A process killed while starting leaves at most recipe.toml and a half-written (hidden)
        # file of its own: nothing to protect.
        if {path.name for path in directory.glob("[!.]*")} - {_RECIPE}:
            raise InputError(f"{directory}: not empty, and no run of llama2rt's; choose another")
        directory.mkdir(parents=True, exist_ok=True)
        _lock(directory)
        manifest = {
            "recipe": resolved,
            "inputs": hashes,
            "parents": [_parent(Path(parent)) for parent in parents],
            "seed": resolved.get("seed"),
            "versions": _versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "complete": False,
        }
        atomic.write(directory / _RECIPE, tomli_w.dumps(resolved))
        atomic.write(directory / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
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
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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


def _check_same(
    directory: Path, manifest: dict[str, Any], recipe: dict[str, Any], hashes: dict[str, Any]
) -> None:
    then, now = _flatten(manifest["recipe"]), _flatten(recipe)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise InputError(
                f"{directory}: started with {key} = {then.get(key)!r}, asked to resume with "
                f"{now.get(key)!r}; use the same recipe or another --out"
            )
    for name in sorted(manifest["inputs"].keys() | hashes.keys()):
        old, new = manifest["inputs"].get(name, {}), hashes.get(name, {})
        if old.get("sha256") != new.get("sha256"):
            raise InputError(
                f"{new.get('path', old.get('path'))}: {name} has changed since the run in "
                f"{directory} started; restore it or start anew with another --out"
            )


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


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
