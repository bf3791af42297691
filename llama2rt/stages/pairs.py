"""What online DPO keeps of an iteration's pairs on disk: the pairs for people, and the reference's
sums, so that a resumed run need not compute them again."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt import atomic
from llama2rt.data import readers
from llama2rt.data.records import Comparison
from llama2rt.errors import InputError
from llama2rt.parallel import by_main, on_main
from llama2rt.rollout.responses import Response

logger = logging.getLogger("llama2rt.stages.pairs")

Pair = tuple[Response, Response]
Sums = dict[str, np.ndarray]

PAIRS = "pairs.jsonl"
REFERENCE_SUMS = "reference_sums.json"
OFFLINE_SUMS = "offline_sums.json"


@by_main
def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """(best, worst) pairs as comparison records, for `read(path, "comparison")` and for people.

    Training goes by tokens and takes all of them; a pair whose text no record can hold (one with a
    null character) is left out here, and counted.
    """
    records = []
    for best, worst in pairs:
        fields = {
            "prompt": best.prompt.messages,
            "chosen": best.text,
            "rejected": worst.text,
            "kind": best.prompt.kind,
            "source": best.policy,
        }
        try:
            records.append(Comparison.from_json(fields))
        except InputError as error:
            logger.debug("%s: a pair left out: %s", path, error)
    if len(records) < len(pairs):
        logger.warning(
            "%s: %d pairs left out that no record can hold", path, len(pairs) - len(records)
        )
    readers.write(path, records)


def kept_sums(path: Path, source: Any, compute: Callable[[], Sums]) -> Sums:
    """fp32 arrays by name as `compute` gives them: out of the file at `path` where it holds those
    of the same `source` (JSON-able: all they depend on), else computed, and written there."""
    key = _digest(source)
    # Read by rank 0 alone: a rank that finds the file already written must not leave the others to
    # compute without it.
    kept = on_main(lambda: _read_sums(path, key))
    if kept is not None:
        return kept
    sums = compute()
    numbers = {name: values.tolist() for name, values in sums.items()}
    content = {"source": key, "sha256": _digest(numbers), "sums": numbers}
    on_main(lambda: atomic.write(path, json.dumps(content) + "\n"))
    return sums


def _read_sums(path: Path, key: str) -> Sums | None:
    """The sums in the file at `path`, or None where they are not those of `key`, which is said."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if found["sha256"] != _digest(found["sums"]):
            raise ValueError("its numbers do not match their hash")
        if found["source"] == key:
            sums = found["sums"].items()
            return {name: np.asarray(values, np.float32) for name, values in sums}
        problem = "of another reference, other pairs or another loss"
    except (ValueError, KeyError, TypeError, OSError) as error:
        problem = f"damaged ({error!r})"
    logger.warning("%s: %s; computed again", path, problem)
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
