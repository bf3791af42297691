"""What went into a run (recipe.toml, manifest.json), and whether a resumed run is still the same.

A manifest holds the recipe, versions, hashes of every input and of the parents' manifests, whether
the run is complete, and every change of the recipe that it was resumed with.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

import llama2rt
from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.run.recipe import Change, Recipe

logger = logging.getLogger("llama2rt.run.manifest")

FILE = "manifest.json"
RECIPE_FILE = "recipe.toml"


def begin(
    recipe: dict[str, Any],
    inputs: dict[str, dict[str, str]],
    parents: Iterable[str | os.PathLike[str]],
) -> dict[str, Any]:
    """The manifest of a new run of `recipe` (`resolve`) on `inputs` (`hash_inputs`).

    InputError for a parent that is no run directory.
    """
    return {
        "recipe": recipe,
        "inputs": inputs,
        "parents": [_parent(Path(parent)) for parent in parents],
        "seed": recipe.get("seed"),
        "versions": _versions(),
        "started": _now(),
        "complete": False,
        **_here(),
    }


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds a run that is finished."""
    path = directory / FILE
    return path.exists() and bool(read(path)["complete"])


def resume(
    directory: Path,
    recipe: BaseModel,
    inputs: dict[str, dict[str, str]],
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """(manifest of the run in `directory`, changes that `recipe` makes to its recipe, whether they
    make it longer). InputError for a change of recipe or `inputs` that would change the result."""
    manifest = read(directory / FILE)
    changes, longer = _changes(directory, manifest, recipe)
    _check_inputs(directory, manifest, inputs)
    return manifest, changes, longer


def changed(
    manifest: dict[str, Any], recipe: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a run that goes on with another recipe; it keeps what was changed."""
    kept = {key: value for key, value in manifest.items() if key not in ("finished", "summary")}
    history = [*manifest.get("resumed", []), {"at": _now(), "changes": changes}]
    return {**kept, "recipe": recipe, "complete": False, "resumed": history, **_here()}


def finished(manifest: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that is complete."""
    return {**manifest, "complete": True, "finished": _now(), "summary": summary}


def read(path: Path) -> dict[str, Any]:
    """The manifest in the file `path`; InputError if it is none."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    for key in ("recipe", "inputs", "complete"):
        if key not in manifest:
            raise InputError(f"{path}: not a manifest of this program: no {key!r}")
    return manifest


def write(directory: Path, manifest: dict[str, Any]) -> None:
    """manifest.json of `directory`, whole or not at all."""
    atomic.write(directory / FILE, json.dumps(manifest, indent=2) + "\n")


def write_with_recipe(directory: Path, manifest: dict[str, Any]) -> None:
    """recipe.toml, then manifest.json, which makes the directory a run."""
    atomic.write(directory / RECIPE_FILE, tomli_w.dumps(manifest["recipe"]))
    write(directory, manifest)


def resolve(recipe: BaseModel) -> dict[str, Any]:
    """The values of `recipe` as JSON and TOML hold them, defaults included."""
    return recipe.model_dump(mode="json", exclude_none=True)


def hash_inputs(inputs: Mapping[str, str | os.PathLike[str]]) -> dict[str, dict[str, str]]:
    """{name: {"path", "sha256"}} of files or folders; InputError for one that cannot be read."""
    return {
        name: {"path": os.fspath(path), "sha256": hash_path(Path(path))}
        for name, path in inputs.items()
    }


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


def _check_inputs(directory: Path, manifest: dict[str, Any], inputs: dict[str, Any]) -> None:
    for name in sorted(manifest["inputs"].keys() | inputs.keys()):
        old, new = manifest["inputs"].get(name, {}), inputs.get(name, {})
        if old.get("sha256") != new.get("sha256"):
            raise InputError(
                f"{new.get('path', old.get('path'))}: {name} has changed since the run in "
                f"{directory} started; restore it or start anew with another --out"
            )


def _changes(
    directory: Path, manifest: dict[str, Any], recipe: BaseModel
) -> tuple[dict[str, Any], bool]:
    """(what differs from the recipe that the run began with, by key, from what to what; whether it
    makes the run longer). InputError for a difference that would change the result."""
    then, now = _flatten(_read_anew(manifest["recipe"], type(recipe))), _flatten(resolve(recipe))
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


def _read_anew(begun: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """The recipe that a run began with as `kind` has it now: keys newer than the run have their
    defaults, under which they change nothing. As it stands where it is no such recipe any more.
    """
    try:
        read = resolve(kind.model_validate(begun))
    except ValidationError:
        return begun
    # What a manifest leaves out of a key that may be None is None.
    nones = {
        name
        for name, field in kind.model_fields.items()
        if name not in begun and type(None) in get_args(field.annotation)
    }
    return {key: value for key, value in read.items() if key not in nones}


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


def _parent(directory: Path) -> dict[str, str]:
    return {"path": os.fspath(directory), "manifest_sha256": hash_path(directory / FILE)}


def _versions() -> dict[str, str]:
    versions = {"llama2rt": llama2rt.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "sentencepiece"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions
