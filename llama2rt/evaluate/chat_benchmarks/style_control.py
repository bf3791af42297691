"""Arena-Hard's style control: how often a model would win if its answers were as long as the
baseline's, and had as many headers, lists and bold passages.

Each battle's Bradley-Terry model has, beside the two models' strengths, one coefficient for each
kind of style, by which the answers differ:

- v0.1 (show_result.py at 0489bf3, utils_math.py at 561534a): (m - b) / (m + b + 1) of tokens and
  counts, in standard deviations over battles; a logistic regression in base 10 with an L2 penalty
  of 1, as scikit-learn has it by default; a tie is a battle won by each. The score is the fit's.
- v2.0 (show_result.py at 005ac12, utils/math_utils.py at a9e743c): (m - b) / (m + b) of tokens, and
  for counts (x - y) / (x + y + 1) of counts by token; no penalty; a tie is half a win. The score is
  the median over the bootstrap.

All models' battles of a category are fitted together, so a model's score depends on which others
are there. Where theirs ends in 0 / 0, this one has a number: a style that never differs counts for
nothing, and an answer without tokens has a density of 0. In v2.0 one of the two controls alone
drops columns of models there; here it drops the other control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks import arena_hard
from llama2rt.evaluate.chat_benchmarks.arena_hard import ENDS, ROUNDS, SEED, Layout
from llama2rt.evaluate.chat_benchmarks.records import Id, identifier, objects

Control = Literal["length", "markdown"]
STYLES = ("length", "headers", "lists", "bold")
CONTROLS: dict[Control, tuple[int, ...]] = {"length": (0,), "markdown": (1, 2, 3)}
"""which of `STYLES` each holds"""
_KEYS = ("token_len", "header_count", "list_count", "bold_count")
_ABOUT = ("answer_id", "ans_id", "tstamp", "choices", "messages")
_QUESTION_ROUNDS = 200


@dataclass(frozen=True)
class Styles:
    """How one model's answers look."""

    model: str
    counts: Mapping[Id, np.ndarray]
    """by question: tokens, headers, list items, bold passages, fp64 [4]"""


def read_styles(path: Path, layout: Layout) -> Styles:
    """Of model_answer/MODEL.jsonl; InputError for an answer without its counts. The model's name is
    the file's."""
    key = "conv_metadata" if layout.version == "v0.1" else "metadata"
    counts: dict[Id, np.ndarray] = {}
    for where, row in objects(path, (layout.id, layout.model, key), _ABOUT):
        number = identifier(where, layout.id, row[layout.id])
        about = row[key]
        if not isinstance(about, Mapping):
            raise InputError(f"{where}: {key}: expected an object with {', '.join(_KEYS)}")
        counts[number] = np.array([_count(f"{where}: {key}", about, name) for name in _KEYS])
    return Styles(path.name.removesuffix(".jsonl"), counts)


def _count(where: str, about: Mapping[str, Any], name: str) -> float:
    """A number, or the sum of an object's."""
    value = about.get(name)
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    counts = [p for p in parts if isinstance(p, int) and not isinstance(p, bool) and p >= 0]
    if len(counts) < len(parts):
        raise InputError(f"{where}: {name}: expected counts from 0 on, got {value!r}")
    return float(sum(counts))


@dataclass(frozen=True)
class _Battles:
    """Battles of some models with one baseline."""

    models: list[str]
    model: np.ndarray
    """int [judgements], index among `models`"""
    question: np.ndarray
    """int [judgements]"""
    style: np.ndarray
    """fp64 [judgements, controlled]: model minus baseline, in standard deviations over battles"""
    judgment: np.ndarray
    """int [battles]: index of a battle's judgement"""
    won: np.ndarray
    """fp64 [battles]: by the model, 1, 0.5 or 0"""


def scores(
    judgments: Sequence[Mapping[str, Any]],
    layout: Layout,
    styles: Mapping[str, Styles],
    controls: Sequence[Control],
    baseline: str | None = None,
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """Rows as of `arena_hard.scores`, for equal style, with the coefficient of each kind of it: by
    how much the log-odds of winning grow with a standard deviation.

    styles: by model, the baseline's among them. baseline: its name, where judgements have none.
    InputError where an answer's style is lacking, and for several baselines of a category.
    """
    controlled = [i for control in CONTROLS if control in controls for i in CONTROLS[control]]
    if not controlled:
        raise InputError(f"control: expected {' or '.join(CONTROLS)}, or both")
    rows = []
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for judgment in judgments:
        category = judgment.get("category", "") if layout.version == "v2.0" else ""
        groups.setdefault(category, []).append(judgment)
    for category, mine in groups.items():
        found = _battles(mine, layout, styles, _baseline(mine, baseline), controlled)
        fits = _fits(found, layout, seed)
        for number, model in enumerate(found.models):
            of_model = [j for j in mine if j["model"] == model]
            row: dict[str, Any] = {"model": model, "category": category}
            row |= {name: ends[number] for name, ends in fits.items() if name != "style"}
            row |= {STYLES[i]: value for i, value in zip(controlled, fits["style"], strict=True)}
            row["battles"] = int((found.model[found.judgment] == number).sum())
            row |= {"questions": len(of_model), "unreadable": arena_hard.unreadable(of_model)}
            rows.append(row)
    return sorted(rows, key=lambda row: (row["category"], -row["score"]))


def _baseline(judgments: Sequence[Mapping[str, Any]], given: str | None) -> str:
    names = {judgment.get("baseline", given) for judgment in judgments}
    if None in names:
        raise InputError("baseline: the judgements do not name it (--baseline)")
    if len(names) > 1 or (given is not None and given not in names):
        held = ", ".join(sorted(map(str, names)))
        raise InputError(f"baseline: expected one in a category, found {held}")
    return str(names.pop())


def _battles(
    judgments: Sequence[Mapping[str, Any]],
    layout: Layout,
    styles: Mapping[str, Styles],
    baseline: str,
    controlled: Sequence[int],
) -> _Battles:
    judged = [(j, won) for j in judgments if (won := arena_hard.battles(j, layout))]
    models = list(dict.fromkeys(judgment["model"] for judgment in judgments))
    for model in models:
        if all(judgment["model"] != model for judgment, _ in judged):
            raise InputError(f"score: no judgement of {model} has a label")
    ids = [judgment[layout.id] for judgment, _ in judged]
    ours = np.array([_style(styles, j["model"], j[layout.id]) for j, _ in judged])
    theirs = np.array([_style(styles, baseline, number) for number in ids])
    counts = np.array([len(won) for _, won in judged])
    questions = {number: i for i, number in enumerate(dict.fromkeys(ids))}
    return _Battles(
        models,
        np.array([models.index(judgment["model"]) for judgment, _ in judged]),
        np.array([questions[number] for number in ids]),
        _standard(_difference(ours, theirs, layout)[:, list(controlled)], counts, layout),
        np.repeat(np.arange(len(judged)), counts),
        np.array([won for _, outcomes in judged for won in outcomes]),
    )


def _style(styles: Mapping[str, Styles], model: str, question: Id) -> np.ndarray:
    if model not in styles:
        raise InputError(f"style control: no answers of {model}: give its file too (--answers)")
    found = styles[model].counts.get(question)
    if found is None:
        raise InputError(f"style control: {model} has no answer to question {question!r}")
    return found


def _difference(ours: np.ndarray, theirs: np.ndarray, layout: Layout) -> np.ndarray:
    """How far each model's style is from the baseline's, fp64 [n, 4] in [-1, 1]."""
    if layout.version == "v0.1":
        return (ours - theirs) / (ours + theirs + 1)
    tokens = np.stack([ours[:, 0], theirs[:, 0]])
    length = (tokens[0] - tokens[1]) / np.maximum(tokens.sum(axis=0), 1)
    a, b = np.stack([ours[:, 1:], theirs[:, 1:]]) / np.maximum(tokens, 1)[:, :, None]
    return np.concatenate([length[:, None], (a - b) / (a + b + 1)], axis=1)


def _standard(style: np.ndarray, counts: np.ndarray, layout: Layout) -> np.ndarray:
    """In standard deviations from the mean over battles, of which each judgement has `counts`; 0
    where there is no deviation."""
    battles = counts.sum()
    apart = style - counts @ style / battles
    freedom = battles if layout.version == "v0.1" else max(battles - 1, 1)
    deviation = np.sqrt(counts @ apart**2 / freedom)
    differs = np.ptp(style, axis=0) > 0
    return np.where(differs, apart / np.where(differs, deviation, 1), 0)


def _fits(found: _Battles, layout: Layout, seed: int) -> dict[str, Any]:
    """By name: `score` [models], `bounds` and `interval` [models, 2], in per cent, and `style`, the
    coefficients [controlled]."""
    once = np.ones(len(found.won))
    battles = len(once)
    generator = np.random.RandomState(seed)  # the generator that they draw from
    if layout.version == "v0.1":
        drawn = np.stack([generator.choice(battles, battles) for _ in range(ROUNDS)])
    else:
        drawn = generator.randint(0, battles, (ROUNDS, battles))
    strength, style = _fit(found, once, layout)
    score = _percent(strength)
    fits = [_fit(found, np.bincount(rows, minlength=battles), layout) for rows in drawn]
    strengths = np.stack([strength for strength, _ in fits])
    if layout.version == "v0.1":  # the percentiles of ratings, as rates
        bounds = _percent(np.percentile(strengths, ENDS["v0.1"], axis=0))
    else:
        bounds = np.percentile(_percent(strengths), ENDS["v2.0"], axis=0)
        score = np.median(_percent(strengths), axis=0)
        style = np.median([style for _, style in fits], axis=0)
    questions = found.question.max() + 1
    units = np.random.default_rng(seed).integers(0, questions, (_QUESTION_ROUNDS, questions))
    times = [np.bincount(unit, minlength=questions)[found.question] for unit in units]
    by_question = np.stack([_fit(found, of[found.judgment], layout)[0] for of in times])
    interval = np.percentile(_percent(by_question), (2.5, 97.5), axis=0)
    return {
        "score": score.tolist(),
        "bounds": bounds.T.tolist(),
        "interval": interval.T.tolist(),
        "style": style.tolist(),
    }


def _percent(strength: np.ndarray) -> np.ndarray:
    """Of battles won, by log-odds."""
    return 100 / (1 + np.exp(-strength))


def _fit(found: _Battles, times: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(log-odds of winning for equal style [models], coefficients of style [controlled]), each
    battle counted so many `times`."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise InputError(f"needs {error.name}: pip install 'llama2rt[benchmarks]'") from None
    old = layout.version == "v0.1"
    judgments, models = len(found.model), len(found.models)
    strength = np.zeros((judgments, models + old))
    strength[np.arange(judgments), found.model] = 1
    if old:  # the penalty is on the baseline's strength too; theirs counts every battle twice
        strength[:, -1] = -1
        strength, times = strength * np.log(10), 2 * times
    features = np.concatenate([strength, found.style], axis=1)
    won = np.bincount(found.judgment, times * found.won, judgments)
    lost = np.bincount(found.judgment, times * (1 - found.won), judgments)
    how: dict[str, Any] = {} if old else {"C": np.inf, "tol": 1e-8, "max_iter": 1000}
    model = LogisticRegression(fit_intercept=False, **how)
    model.fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], judgments),
        sample_weight=np.concatenate([won, lost]),
    )
    coefficients = model.coef_[0]
    strengths = coefficients[:models]
    if old:
        strengths = np.log(10) * (strengths - coefficients[models])
    return strengths, coefficients[models + old :]
