"""`llama2rt prepare`: what a shipped plan starts from, from the command line."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.prepare import gsm8k, toy
from llama2rt.run import hash_path

MARK = "prepared.json"
"""written first: what was asked for"""


def prepare(
    plan: tyro.conf.Positional[Literal["v1-v5-toy", "v1-v5-gsm8k"]],
    *,
    out: Path,
    source: Path | None = None,
    seed: int = 0,
    smoke_test: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Write what a shipped plan reads; again into the same folder it writes the same.

    Args:
        plan: The plan's name.
        out: Folder that receives it; the plans look into runs/toy and runs/gsm8k.
        source: Of v1-v5-gsm8k, the folder that holds gsm8k_train.jsonl and
            gsm8k_model_solutions.jsonl (openai/grade-school-math).
        seed: Of the data, the division and the random weights.
        smoke_test: Next to nothing, to see whether all is in place.
        as_json: Print one JSON object.
    """
    if seed < 0:
        raise InputError(f"seed: expected at least 0, got {seed}")
    if (plan == "v1-v5-gsm8k") == (source is None):
        raise InputError("source: the folder of GSM8K's files, for v1-v5-gsm8k and no other")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder, or nothing yet")
    asked: dict[str, object] = {"plan": plan, "seed": seed, "smoke_test": smoke_test}
    if source is not None:
        asked["source"] = gsm8k.source_hashes(source)
    if begun := _begun(out):
        if any(begun.get(key) != value for key, value in asked.items()):
            raise InputError(f"{out}: was prepared otherwise, {begun}; choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty, and not of this command; choose another folder")
    if not begun:
        out.mkdir(parents=True, exist_ok=True)
        atomic.write(out / MARK, json.dumps(asked))
    try:
        if source is None:
            toy.write(out, toy.smoke(seed) if smoke_test else toy.sizes(seed))
        else:
            gsm8k.write(out, source, gsm8k.smoke(seed) if smoke_test else gsm8k.Sizes(seed))
    except InputError:
        if not begun:  # it was empty, or not there
            shutil.rmtree(out)
        raise
    said = {"out": str(out), "files": _hashes(out)}
    print(json.dumps(said) if as_json else f"{out}: {len(said['files'])} files")


def _begun(out: Path) -> dict[str, object]:
    path = out / MARK
    if not path.is_file():
        return {}
    try:
        found: dict[str, object] = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path}: not JSON; choose another folder") from None
    return found


def _hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file by its path in `out`."""
    return {
        str(path.relative_to(out)): hash_path(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MARK
    }
