"""AlpacaEval 2's files (the `alpaca-eval` package 0.6.6): model outputs, annotations, win rates.

A model's outputs are a JSON array of {instruction, output, generator, dataset}. Annotations are an
array with both outputs and `preference`, 1 where output_1, the baseline's, is better, 2 where
output_2 is, anything between them for a judge that weighs; 1.5, or 0 in old files, is a draw.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks.records import (
    Answered,
    Answers,
    Id,
    Question,
    new,
    objects,
    required,
    text,
)
from llama2rt.evaluate.intervals import bootstrap
from llama2rt.evaluate.judges import comparing
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.judging import Judge
from llama2rt.evaluate.judges.judging import Question as Shown

DATASET = "alpaca_eval"
BASELINE, MODEL, DRAW = 1.0, 2.0, 1.5
_OLD_DRAW = 0.0
_ANNOTATED = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "preference")
_ABOUT = ("dataset", "annotator", "price_per_example", "time_per_example", "raw_completion")


def read_questions(path: Path) -> list[Question]:
    """The instructions of an evaluation set, or of any model's outputs."""
    found, seen = [], dict[Any, str]()
    for where, row in objects(path, ("instruction",), ("output", "generator", "dataset")):
        instruction = text(where, "instruction", row["instruction"])
        new(where, "instruction", instruction, seen)
        found.append(Question(instruction, (instruction,), str(row.get("dataset", DATASET))))
    return found


def read_answers(path: Path) -> Answers:
    """A model's outputs, all of one generator."""
    model, seen = "", dict[Any, str]()
    turns: dict[Id, tuple[str, ...]] = {}
    for where, row in objects(path, ("instruction", "output", "generator"), ("dataset",)):
        instruction = text(where, "instruction", row["instruction"])
        new(where, "instruction", instruction, seen)
        generator = text(where, "generator", row["generator"])
        if model and generator != model:
            raise InputError(f"{where}: generator: expected {model!r} as before, got {generator!r}")
        model = generator
        turns[instruction] = (text(where, "output", row["output"], blank=True),)
    return Answers(model, turns)


def write_answers(path: Path, model: str, answered: Sequence[Answered]) -> None:
    """A model's outputs."""
    records = [
        {
            "dataset": one.question.category,
            "instruction": one.question.turns[0],
            "output": one.replies[0].text,
            "generator": model,
        }
        for one in answered
    ]
    atomic.write(path, json.dumps(records, indent=2, ensure_ascii=False) + "\n")


def judge(
    by: Judge, questions: Sequence[Question], baseline: Answers, model: Answers, cache: Cache
) -> list[dict[str, Any]]:
    """Annotations of `model` against `baseline`, each pair in both orders, in the order of
    `questions`; a preference is the mean of the two."""
    pairs = []
    for question in questions:
        ours, theirs = (required(a, question, a.model)[0] for a in (model, baseline))
        messages = [{"role": "user", "content": question.turns[0]}]
        shown = Shown(messages, ours, theirs)
        pairs.append(comparing.Shown(model.model, baseline.model, str(question.id), shown))
    by.check([order for pair in pairs for order in (pair.question, pair.question.swapped())])
    return [
        {
            "instruction": question.turns[0],
            "output_1": pair.question.second,
            "generator_1": baseline.model,
            "dataset": question.category,
            "output_2": pair.question.first,
            "generator_2": model.model,
            "annotator": by.name,
            "preference": DRAW + outcome.margin / 2,
        }
        for question, pair, outcome in zip(
            questions, pairs, comparing.outcomes(by, pairs, cache), strict=True
        )
    ]


def read_annotations(path: Path) -> list[Mapping[str, Any]]:
    """Annotations of one model against one baseline, by one annotator; a preference may be null, as
    the package leaves one that it could not read."""
    found: list[Mapping[str, Any]] = []
    for where, row in objects(path, _ANNOTATED, _ABOUT):
        for key in ("output_1", "output_2"):
            text(where, key, row[key], blank=True)
        for key in ("generator_1", "generator_2", "annotator"):
            if found and row.get(key) != found[0].get(key):
                raise InputError(
                    f"{where}: {key}: expected {found[0].get(key)!r} as before, "
                    f"got {row.get(key)!r}"
                )
        value = row["preference"]
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (value == _OLD_DRAW or BASELINE <= value <= MODEL)
        ):
            raise InputError(
                f"{where}: preference: expected 1 to 2, or 0 for a draw, got {value!r}"
            )
        found.append(row)
    return found


def preferences(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """fp64 [n] in [0, 1], 1 where the model is better; NaN where there is none."""
    values = [np.nan if a["preference"] is None else a["preference"] for a in annotations]
    given = np.array(values, dtype=np.float64)
    return np.where(given == _OLD_DRAW, DRAW, given) - BASELINE


def win_rate(annotations: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """In per cent, under the package's names, and `interval`, the bootstrap's of 95 % over
    instructions. InputError where no annotation has a preference."""
    found = preferences(annotations)
    found = found[~np.isnan(found)]
    if not len(found):
        raise InputError("preference: none of the annotations has one")
    # The package counts a weighted preference as won or lost outright from half on; its rounding
    # is to even.
    discrete = np.where(found == DRAW - BASELINE, DRAW - BASELINE, np.round(found + BASELINE) - 1)
    interval = bootstrap(100 * found, seed=seed)
    return {
        "win_rate": 100 * float(found.mean()),
        "standard_error": standard_error(100 * found),
        "n_wins": int((found > DRAW - BASELINE).sum()),
        "n_wins_base": int((found < DRAW - BASELINE).sum()),
        "n_draws": int((found == DRAW - BASELINE).sum()),
        "n_total": len(found),
        "discrete_win_rate": 100 * float(discrete.mean()),
        "interval": [interval.low, interval.high],
        "avg_length": int(np.mean([len(a["output_2"]) for a in annotations])),
    }


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))
