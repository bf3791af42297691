"""Reward models side by side on the same comparisons: the shape of Llama 2's Tables 7, 8, 28, 29.

Each model has the scores of one or more training seeds. What is shown of a model is the mean over
its seeds, pair by pair; intervals are over pairs, the unit that a test set is drawn in, and
`by_seed` shows how far the seeds lie apart. All models are measured on the pairs that all of them
can read: one with a short context would otherwise answer an easier test.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.data.records import RATINGS, SAFETY, Comparison
from llama2rt.evaluate.calibration import calibration
from llama2rt.evaluate.intervals import paired, wilson
from llama2rt.evaluate.preference import AVERAGE, UNRATED

Scores = tuple[ArrayLike, ArrayLike]
"""Raw scores [n] of the chosen and of the rejected side of n pairs; NaN for a pair that the model
cannot read."""


def compare(
    scores: Mapping[str, Sequence[Scores]], comparisons: Sequence[Comparison], *, seed: int = 0
) -> dict[str, Any]:
    """Models on the same pairs, from their scores of each training seed.

    Gives `pairs` (those that all can read), `unread` (by model, where it could not read some),
    `models` (by name, see `_of_model`) and `differences` (by name, of each model but the first:
    its accuracy - the first one's on the same pairs, {mean, low, high} with its paired interval).
    ValueError for no models, scores that are not two vectors of as many as there are comparisons,
    or no pair that all can read.
    """
    if not scores:
        raise ValueError("scores: no model")
    tables = {name: _table(name, runs, len(comparisons)) for name, runs in scores.items()}
    read = {name: np.isfinite(table).all(axis=(0, 1)) for name, table in tables.items()}
    shared = np.logical_and.reduce(list(read.values()))
    if not shared.any():
        raise ValueError(f"no pair that all of {', '.join(scores)} can read")
    kept = [pair for pair, inside in zip(comparisons, shared, strict=True) if inside]
    tables = {name: table[:, :, shared] for name, table in tables.items()}
    correct = {name: _correct(table) for name, table in tables.items()}
    first, *others = correct
    return {
        "pairs": len(kept),
        "unread": {name: int((~found).sum()) for name, found in read.items() if not found.all()},
        "models": {name: _of_model(tables[name], correct[name], kept, seed) for name in scores},
        "differences": {
            name: paired(
                correct[name].mean(axis=0), correct[first].mean(axis=0), seed=seed
            )._asdict()
            for name in others
        },
    }


def _table(name: str, runs: Sequence[Scores], pairs: int) -> np.ndarray:
    """fp64 [seeds, sides, pairs]."""
    table = np.array([[np.asarray(side, np.float64) for side in run] for run in runs])
    if not len(runs) or table.shape[1:] != (2, pairs):
        raise ValueError(f"{name}: expected scores of both sides of {pairs} pairs for each seed")
    return table


def _correct(table: np.ndarray) -> np.ndarray:
    """Whether each seed ranks each pair as annotated, fp64 [seeds, pairs]; a tie counts half."""
    chosen, rejected = table[:, 0], table[:, 1]
    return np.where(chosen == rejected, 0.5, chosen > rejected)


def _of_model(
    table: np.ndarray, correct: np.ndarray, pairs: Sequence[Comparison], seed: int
) -> dict[str, Any]:
    """`intervals` by rating, best first, and over all (Table 28); `labels`, the same by safety
    label, and `unsafe`, how many responses of each label score below 0 (Table 29), where safety is
    labelled; `sources`, where there are several; `calibration` of the first seed with the expected
    calibration error of each in `errors`; `scores`: mean and standard deviation of all scores and
    the mean `gap` of chosen over rejected, by which a drift shows."""
    ratings = [pair.rating or UNRATED for pair in pairs]
    labels = [pair.safety for pair in pairs]
    sources = [pair.source or "none" for pair in pairs]
    ties = (table[:, 0] == table[:, 1]).mean(axis=0)
    calibrations = [calibration(*run, seed=seed) for run in table]
    numbers: dict[str, Any] = {
        "intervals": _rows(correct, ties, ratings, (*RATINGS, UNRATED)),
        "calibration": calibrations[0],
        "errors": [found["error"] for found in calibrations],
        "scores": {
            "mean": float(table.mean()),
            "std": float(table.std()),
            "gap": float((table[:, 0] - table[:, 1]).mean()),
        },
    }
    if any(labels):
        numbers["labels"] = _rows(correct, ties, labels, SAFETY)[:-1]
        numbers["unsafe"] = unsafe(table, labels)
    if len(names := sorted(set(sources))) > 1:
        numbers["sources"] = {
            row["rating"]: row for row in _rows(correct, ties, sources, tuple(names))[:-1]
        }
    return numbers


def _rows(
    correct: np.ndarray, ties: np.ndarray, of: Sequence[str | None], groups: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of `preference.accuracy_table` with `by_seed`: of the pairs in each of `groups` that
    there are, then of all."""
    found = np.array(of, dtype=object)
    rows = []
    for name in (*groups, AVERAGE):
        inside = np.ones(len(found), bool) if name == AVERAGE else found == name
        if pairs := int(inside.sum()):
            by_seed = correct[:, inside].mean(axis=1)
            rows.append(
                {
                    "rating": name,
                    **wilson(float(by_seed.mean() * pairs), pairs)._asdict(),
                    "pairs": pairs,
                    "ties": float(ties[inside].sum()),
                    "by_seed": by_seed.tolist(),
                }
            )
    return rows


def unsafe(table: np.ndarray, labels: Sequence[str | None]) -> dict[str, Any]:
    """What the safety score says of single responses, from scores [seeds, sides, pairs]: `recall`,
    the share of unsafe responses below 0, where the sigmoid is 0.5 (Table 29), and `false_alarms`,
    the share of safe ones that lie there too; {mean, low, high, responses, by_seed}, absent where
    no response is so labelled. A recall of 1 costs nothing where every response is called unsafe,
    so neither is worth much alone."""
    chosen_is_unsafe = np.array([label == "both_unsafe" for label in labels])
    rejected_is_unsafe = np.array([label in ("chosen_safe", "both_unsafe") for label in labels])
    labelled = np.array([label is not None for label in labels])
    found = {}
    for name, wanted in (("recall", True), ("false_alarms", False)):
        sides = [
            table[:, side][:, labelled & (is_unsafe == wanted)]
            for side, is_unsafe in enumerate((chosen_is_unsafe, rejected_is_unsafe))
        ]
        below = np.concatenate(sides, axis=1) < 0
        if responses := below.shape[1]:
            by_seed = below.mean(axis=1)
            found[name] = {
                **wilson(float(by_seed.mean() * responses), responses)._asdict(),
                "responses": responses,
                "by_seed": by_seed.tolist(),
            }
    return found
