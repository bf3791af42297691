"""RewardBench's files: pairs in, results out and in.

Pairs are rows of `allenai/reward-bench` (prompt, chosen, rejected, subset, id, and the models that
answered) or of `allenai/preference-test-sets`, whose prompts are message lists and whose subset is
the split, hence the file's name. Result files are those of the `rewardbench` package 0.1.4, of its
script (one key a subset) and of its command (`extra_results`).
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2rt import atomic
from llama2rt.data import strict_json
from llama2rt.data.files import rows
from llama2rt.data.json_values import shown, type_name
from llama2rt.data.records import Comparison
from llama2rt.errors import InputError
from llama2rt.evaluate.rewardbench.weighting import CORE, OTHER_PRIOR, PRIOR

logger = logging.getLogger("llama2rt.evaluate.rewardbench")

KNOWN = frozenset({*CORE, *PRIOR, *OTHER_PRIOR})
_USED = frozenset({"prompt", "chosen", "rejected", "id"})
_CARRIED = frozenset({"chosen_model", "rejected_model", "subset", "subsubset"})
_ABOUT = frozenset(
    {
        *("model", "model_type", "model_beaker", "ref_model", "tokenizer", "chat_template"),
        *("accuracy", "num_prompts", "extra_results"),
    }
)


@dataclass(frozen=True)
class BenchmarkPair:
    """One prompt with its two answers."""

    id: str
    """as the file has it, else FILE:NUMBER"""
    subset: str
    comparison: Comparison


def read_pairs(paths: Sequence[Path], skip_invalid: int = 0) -> list[BenchmarkPair]:
    """The pairs of all files, in order; keys that nothing reads are counted and said. InputError
    with FILE:LINE for a bad row beyond the `skip_invalid` that are tolerated and said, for a subset
    that is none of RewardBench's, and for one of which two pairs share an id."""
    pairs: list[BenchmarkPair] = []
    skipped = 0
    seen: dict[tuple[str, str], str] = {}
    for path in paths:
        unused: Counter[str] = Counter()
        before = len(pairs)
        for number, row in rows(path, "comparison", None):
            where = f"{path}:{number}"
            try:
                if isinstance(row, InputError):
                    raise row
                pair = _pair(row, path, f"{path.name}:{number}", unused)
                if earlier := seen.get((pair.subset, pair.id)):
                    raise InputError(f"id: {pair.id} of {pair.subset} is that of {earlier} too")
                seen[pair.subset, pair.id] = where
                pairs.append(pair)
            except InputError as error:
                if skipped == skip_invalid:
                    raise InputError(f"{where}: {error}") from None
                skipped += 1
                logger.warning("skipped %s: %s", where, error)
        if len(pairs) == before:
            raise InputError(f"{path}:1: no pairs")
        for key, count in unused.items():
            logger.warning("%s: key not used: %s (%d rows)", path, key, count)
    return pairs


def _pair(row: Any, path: Path, identifier: str, unused: Counter[str]) -> BenchmarkPair:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a JSON object, got {type_name(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    for key in ("prompt", "chosen", "rejected"):
        if key not in row:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise InputError(f"missing key {key!r} (keys found: {found})")
    subset = _split(path)
    if subset is None:
        subset = row.get("subset")
        if subset not in KNOWN:
            raise InputError(
                f"subset: expected one of RewardBench's, got {shown(subset)}; a file of a prior "
                f"test set is named after it: {', '.join(PRIOR)}"
            )
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    record = {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    comparison = Comparison.from_json(record)
    given = row.get("id", identifier)
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise InputError(f"id: expected a number or text, got {type_name(given)}")
    unused.update(row.keys() - _USED - _CARRIED)
    return BenchmarkPair(str(given), str(subset), comparison)


def _split(path: Path) -> str | None:
    """The prior test set that a file is named after, as Hugging Face names a split's files:
    `shp-00000-of-00001.parquet`; None where rows say what they are of."""
    name = re.split(r"[-.]", path.name, maxsplit=1)[0]
    return name if name in KNOWN - CORE else None


def write_results(
    folder: Path, name: str, about: Mapping[str, Any], accuracy: Mapping[str, float]
) -> None:
    """`eval-set/NAME.json` of the benchmark's own subsets and `pref-sets/NAME.json` of the prior
    test sets below `folder`, each where there are any. `about`: model, model_type,
    chat_template."""
    for part, subsets in (("eval-set", CORE), ("pref-sets", KNOWN - CORE)):
        found = {subset: share for subset, share in accuracy.items() if subset in subsets}
        if found:
            _write(folder / part / f"{name}.json", {**about, **found})


def write_scores(
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    pairs: Sequence[BenchmarkPair],
    columns: Mapping[str, Sequence[float]],
) -> None:
    """`eval-set-scores/NAME.json` and `pref-sets-scores/NAME.json`: a column each of id, subset,
    the dialogues and `columns` (results, scores_chosen, scores_rejected), a row a pair."""
    parts = (("eval-set-scores", CORE), ("pref-sets-scores", KNOWN - CORE))
    for part, subsets in parts:
        rows_of_part = [i for i, pair in enumerate(pairs) if pair.subset in subsets]
        if not rows_of_part:
            continue
        those = [pairs[i] for i in rows_of_part]
        table: dict[str, Any] = {
            "id": [pair.id for pair in those],
            "subset": [pair.subset for pair in those],
        }
        for side in ("chosen", "rejected"):
            table[f"text_{side}"] = [
                [
                    *pair.comparison.prompt,
                    {"role": "assistant", "content": getattr(pair.comparison, side)},
                ]
                for pair in those
            ]
        for key, values in columns.items():
            table[key] = [values[i] for i in rows_of_part]
        _write(folder / part / f"{name}.json", {**about, **table})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=4, sort_keys=True, allow_nan=False, ensure_ascii=False)
    atomic.write(path, text)


def read_results(path: Path) -> tuple[str, dict[str, float]]:
    """(model, accuracy by subset) of a result file. Other numbers in it are counted and said.
    InputError for a file that holds no accuracy of a subset, or one that is none."""
    try:
        content = strict_json.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid UTF-8") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a JSON object, got {type_name(content)}")
    given = content.get("extra_results") or content
    if not isinstance(given, Mapping):
        raise InputError(f"{path}: extra_results: expected an object, got {type_name(given)}")
    accuracy = {}
    for subset in sorted(given.keys() & KNOWN):
        value = given[subset]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise InputError(f"{path}: {subset}: expected a share in [0, 1], got {shown(value)}")
        accuracy[subset] = float(value)
    if not accuracy:
        raise InputError(f"{path}: holds no accuracy of any of RewardBench's subsets")
    if unused := sorted(given.keys() - KNOWN - _ABOUT):
        logger.warning("%s: keys not used: %s", path, ", ".join(map(str, unused)))
    model = content.get("model", path.stem)
    if not isinstance(model, str):
        raise InputError(f"{path}: model: expected text, got {type_name(model)}")
    return model, accuracy
