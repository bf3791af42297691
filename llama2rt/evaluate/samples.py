"""Files of samples as versions: a file, or a folder of a run's parts, is one version."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from llama2rt.data.files import rows
from llama2rt.data.readers import read
from llama2rt.data.records import Sample
from llama2rt.errors import InputError

T = TypeVar("T")
_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def sample_files(path: Path) -> list[Path]:
    """The files of one version: a file, a saved dataset, or a folder's files, such as the parts
    that a stage leaves in samples/ (also found from its run directory). InputError for a folder
    without any."""
    datasets = ("state.json", "dataset_dict.json")
    if not path.is_dir() or any((path / name).is_file() for name in datasets):
        return [path]
    folder = path / "samples" if (path / "samples").is_dir() else path
    if (folder / "manifest.json").is_file():
        inside = ", ".join(sorted(str(found) for found in path.glob("*/samples"))) or "none"
        raise InputError(f"{path}: a run directory without samples of its own; inside it: {inside}")
    if parts := sorted(folder.glob("part-*.jsonl")):
        return parts
    files = sorted(file for file in folder.iterdir() if file.name.endswith(_ENDINGS))
    if not files:
        raise InputError(f"{path}: holds no samples (no part-*.jsonl, nor any {_ENDINGS[0]} file)")
    return files


def read_samples(path: Path, skip_invalid: int = 0) -> list[Sample]:
    """One version's samples. InputError, besides those of `sample_files` and of the reader, where
    two files that are no parts of a run answer the same prompt."""
    files = sample_files(path)
    parts = all(file.name.startswith("part-") for file in files)
    records: list[Sample] = []
    first: dict[str, Path] = {}
    for file in files:
        found: list[Sample] = read(file, "sample", skip_invalid)
        for prompt in () if parts else dict.fromkeys(record.prompt_id for record in found):
            if prompt in first:
                raise InputError(
                    f"{path}: {first[prompt].name} and {file.name} both answer prompt {prompt!r}, "
                    "so they are no parts of one version; name the files"
                )
            first[prompt] = file
        records += found
    return records


def kinds_of(path: Path) -> dict[str, str]:
    """The kind of each prompt by its id, as far as the samples of a version say it."""
    found: dict[str, str] = {}
    for file in sample_files(path):
        for _, row in rows(file, "sample", None):
            if isinstance(row, dict) and isinstance(row.get("kind"), str):
                found[str(row.get("prompt_id"))] = row["kind"]
    return found


def by_version(files: Mapping[Path, T]) -> dict[str, T]:
    """Versions by file name, a run's samples/ by the run's, or by path where two share a name."""
    folders = [Path(os.path.abspath(path)) for path in files]  # "." has no name
    owners = [path.parent if path.name == "samples" and path.is_dir() else path for path in folders]
    names: Sequence[str] = [path.name.split(".")[0] for path in owners]
    return {
        name if names.count(name) == 1 else str(path): records
        for name, (path, records) in zip(names, files.items(), strict=True)
    }
