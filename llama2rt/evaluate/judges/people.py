"""People as a judge: what `llama2rt people export` writes of an evaluation on its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.data.files import rows
from llama2rt.errors import InputError
from llama2rt.evaluate import human
from llama2rt.evaluate.intervals import bootstrap, wilson
from llama2rt.evaluate.judges.comparing import EVEN, matrix

_KEYS = (
    "prompt_id",
    "messages",
    "variant",
    "against",
    "responses",
    "score",
    "shown_first",
    "rater",
)
_CARRIED = {"time"}


def read(paths: Sequence[Path]) -> tuple[list[human.Judged], dict[str, float]]:
    """(judgements, how often the answer that was shown first was the better one: `better` of
    `decided`). InputError with FILE:LINE for what is no judgement of an evaluation."""
    judged: list[human.Judged] = []
    better = decided = 0
    for path in paths:
        before = len(judged)
        for number, row in rows(path, "judgement", None):
            try:
                one, first = _judgement(row)
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from None
            judged.append(one)
            if one.score:
                decided += 1
                better += (one.score > 0) == (first == one.versions[0])
        if len(judged) == before:
            raise InputError(f"{path}: holds no judgements")
    return judged, {"better": better, "decided": decided}


def results(paths: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """As `comparing.results`: `pairs` with wins, ties, losses and AC1 and AC2 on the 7 points, a
    pair's outcome being the median of its raters; `matrix`; and the share of decided judgements
    that went to the answer that was shown first."""
    judged, shown = read(paths)
    pairs = []
    for (a, b), mine in human.by_versions(judged).items():
        points = np.sign(list(human.points(mine).values()))
        pairs.append(
            {
                "a": a,
                "b": b,
                "prompts": len(points),
                "rate": bootstrap(EVEN + points / 2, seed=seed)._asdict(),
                "wins": int((points > 0).sum()),
                "ties": int((points == 0).sum()),
                "losses": int((points < 0).sum()),
                "raters": len({one.rater for one in mine}),
                "agreement": {
                    name: {"mean": found.coefficient, "low": found.low, "high": found.high}
                    | {"pairs": several}
                    for name, (found, several) in human.agreement(mine).items()
                },
            }
        )
    numbers = {"name": "people", "kind": "people", "pairs": pairs, "matrix": matrix(pairs)}
    if shown["decided"]:
        first = wilson(shown["better"], int(shown["decided"]))._asdict()
        numbers["position"] = {"first": first, "flipped": None, "judgements": shown["decided"]}
    return numbers


def _judgement(row: Any) -> tuple[human.Judged, str]:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, Mapping):
        raise InputError("expected a JSON object")
    for key in _KEYS:
        if key not in row:
            raise InputError(f"missing key {key!r}: expected what `llama2rt people export` writes")
    if unknown := row.keys() - {*_KEYS, *_CARRIED}:
        raise InputError(f"unknown key {min(unknown)!r}")
    for key in ("prompt_id", "variant", "against", "shown_first", "rater"):
        if not isinstance(row[key], str) or not row[key]:
            raise InputError(f"{key}: expected text that is not empty")
    score, names = row["score"], (row["variant"], row["against"])
    if isinstance(score, bool) or not isinstance(score, int) or not -3 <= score <= 3:
        raise InputError(f"score: expected a whole number from -3 to 3, got {score!r}")
    if row["shown_first"] not in names:
        raise InputError(f"shown_first: expected {names[0]!r} or {names[1]!r}")
    item = (row["prompt_id"], *names, repr(row["messages"]), repr(row["responses"]))
    return human.Judged(names, item, row["rater"], score), row["shown_first"]
