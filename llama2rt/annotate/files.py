"""People's judgements, read from files.

A line is `{"pair": ID, "chosen": "first" | "second" | "neither", "rating": ..., "first_safe": ...,
"second_safe": ...}`; ID is that of a line of the `pairs.jsonl` that the annotate stage leaves.
`rating` and the two safety labels may be absent; "neither" is how a person says that the pair
cannot be decided.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2rt.annotate.pairs import AnswerPair, Judgement
from llama2rt.data.files import rows
from llama2rt.data.records import RATINGS
from llama2rt.errors import InputError

logger = logging.getLogger("llama2rt.annotate.files")

_KEYS = ("pair", "chosen", "rating", "first_safe", "second_safe")
_CHOICES = ("first", "second", "neither")


class FileAnnotator:
    """Judgements that are there already. InputError where a pair of `pairs_file` has none, or where
    a line is malformed or contradicts another one about the same pair. Lines about pairs of other
    batches, which one file may hold too, are counted."""

    def __init__(self, files: Sequence[Path], pairs_file: Path) -> None:
        self._files, self._pairs_file = files, pairs_file

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        # Of both parts, since people judge the whole file.
        known = [row["id"] for _, row in rows(self._pairs_file, "pair", None)]
        missing = [path for path in self._files if not path.exists()]
        if missing:
            raise InputError(
                f"annotator.files: {missing[0]}: no such file; {len(known)} pairs in "
                f"{self._pairs_file} wait for a judgement each, then continue with --resume"
            )
        said = self._read()
        if others := len(said.keys() - set(known)):
            logger.info("%d judgements are of pairs that are not in %s", others, self._pairs_file)
        waiting = [identifier for identifier in known if identifier not in said]
        if waiting:
            raise InputError(
                f"annotator.files: {len(waiting)} of {len(known)} pairs in {self._pairs_file} have "
                f'no judgement, such as {waiting[0]!r}; "neither" says that one cannot be decided'
            )
        return [said[pair.id] for pair in pairs]

    def _read(self) -> dict[str, Judgement | None]:
        said: dict[str, Judgement | None] = {}
        for path in self._files:
            for line, row in rows(path, "judgement", None):
                try:
                    if isinstance(row, InputError):
                        raise row
                    identifier, judgement = parse(row)
                    if said.get(identifier, judgement) != judgement:
                        raise InputError(f"pair: {identifier!r} was judged otherwise before")
                except InputError as error:
                    raise InputError(f"{path}:{line}: {error}") from None
                said[identifier] = judgement
        return said


def parse(row: Any) -> tuple[str, Judgement | None]:
    """(id of the pair, what was said of it); InputError naming the key that is wrong."""
    if not isinstance(row, Mapping):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    if unknown := sorted(row.keys() - set(_KEYS)):
        raise InputError(f"unknown key {unknown[0]!r}: expected {', '.join(_KEYS)}")
    for key in ("pair", "chosen"):
        if not isinstance(row.get(key), str):
            raise InputError(f"{key}: expected text, got {row.get(key)!r}")
    if row["chosen"] not in _CHOICES:
        raise InputError(f"chosen: expected one of {', '.join(_CHOICES)}, got {row['chosen']!r}")
    if "rating" in row and row["rating"] not in RATINGS:
        raise InputError(f"rating: expected one of {', '.join(RATINGS)}, got {row['rating']!r}")
    for key in ("first_safe", "second_safe"):
        if not isinstance(row.get(key, True), bool):
            raise InputError(f"{key}: expected true or false, got {row[key]!r}")
    if ("first_safe" in row) != ("second_safe" in row):
        raise InputError("first_safe, second_safe: give both or neither")
    if row["chosen"] == "neither":
        return row["pair"], None
    return row["pair"], Judgement(
        row["chosen"], row.get("rating"), row.get("first_safe"), row.get("second_safe")
    )
