"""The length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475).

What a judge prefers is modelled as a logistic regression on three things: how much longer the
model's output is than the baseline's, how hard the instruction is, and which model it is. The win
rate is then what the regression predicts for outputs of equal length. To keep a model from gaming
it with its length, two versions of the baseline, one told to be concise and one told to be verbose,
are fitted along with it at a small weight; they and the difficulties are the benchmark's own table,
df_gamed.csv.

The numbers are those of the `alpaca-eval` package 0.6.6, which takes the regression from
scikit-learn: liblinear stops at a tolerance, so another solver would differ in the fourth digit.
The package looks an instruction's difficulty up by the row's place among the annotations, which is
right as long as all 805 are there and in order; here it is looked up by the instruction's place in
the evaluation set.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks import alpaca_eval

GAMED_WEIGHT = 0.2
"""of the two gamed baselines together, for a weight of 1 of the model"""
FOLDS = 5
SEED = 123
STRENGTHS = np.logspace(-4, 4, 10)
"""inverse strengths of the L1 penalty that cross-validation chooses from: scikit-learn's own"""
_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True)
class Gamed:
    """df_gamed.csv."""

    preference: np.ndarray
    """fp64 [m] in [0, 1]"""
    length: np.ndarray
    """fp64 [m]: by how much the outputs differ in length, in standard deviations"""
    difficulty: np.ndarray
    """fp64 [m], of each row's instruction"""
    of_instruction: np.ndarray
    """fp64 [instructions]: difficulties in the evaluation set's order"""


def read_gamed(path: Path) -> Gamed:
    """The table in a CSV file; InputError with FILE:LINE otherwise."""
    columns: dict[str, list[float]] = {key: [] for key in _COLUMNS}
    of_instruction: dict[int, float] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            for row in table:
                columns["preference"].append(float(row["preference"]))
                columns["std_delta_len"].append(float(row["std_delta_len"]))
                columns["instruction_difficulty"].append(float(row["instruction_difficulty"]))
                if row["not_gamed_baseline"].strip().lower() != "false":
                    raise ValueError("not_gamed_baseline: expected False")
                index, difficulty = int(row["index"]), columns["instruction_difficulty"][-1]
                if of_instruction.setdefault(index, difficulty) != difficulty:
                    raise ValueError(f"index: {index} has two difficulties")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}:{table.line_num}: not a row of df_gamed.csv ({error})") from None
    if sorted(of_instruction) != list(range(len(of_instruction))) or not of_instruction:
        raise InputError(f"{path}:1: index: expected the instructions' places, from 0")
    return Gamed(
        np.array(columns["preference"]),
        np.array(columns["std_delta_len"]),
        np.array(columns["instruction_difficulty"]),
        np.array([of_instruction[i] for i in range(len(of_instruction))]),
    )


def length_controlled(
    annotations: Sequence[Mapping[str, Any]],
    gamed: Gamed | None,
    places: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """`length_controlled_winrate` and its `lc_standard_error`, in per cent.

    gamed: without it, neither difficulty nor regularisation, the package's
    length_controlled_minimal.
    places: of the annotations' instructions in the evaluation set; by default the annotations are
    all of it, in order. InputError where they are not, and without scikit-learn.
    """
    wanted = alpaca_eval.preferences(annotations)
    lengths = np.array([[len(a["output_1"]), len(a["output_2"])] for a in annotations], np.float64)
    longer = lengths[:, 0] - lengths[:, 1]
    deviation = longer.std(ddof=1) if len(longer) > 1 else 0.0
    if not deviation:
        raise InputError(
            "length-controlled: all outputs differ by the same length, or there is one"
        )
    mine = [np.tanh(longer / deviation), np.ones(len(annotations))]
    if gamed is None:
        features, weights = np.stack(mine, axis=1), np.ones(len(annotations))
        targets = wanted
    else:
        difficulty = _difficulties(gamed, len(annotations), places)
        ours = np.stack([mine[0], difficulty, mine[1]], axis=1)
        theirs = np.stack(
            [np.tanh(gamed.length), gamed.difficulty, np.zeros(len(gamed.length))], axis=1
        )
        # Two gamed baselines share the weight.
        weight = np.full(len(theirs), GAMED_WEIGHT / 2)
        features, targets = np.concatenate([theirs, ours]), np.r_[gamed.preference, wanted]
        weights = np.r_[weight, np.ones(len(ours))]
    coefficients = _fit(features, targets, weights)
    same_length = features[len(features) - len(annotations) :].copy()
    same_length[:, 0] = 0
    predicted = 1 / (1 + np.exp(-same_length @ coefficients))
    return {
        "length_controlled_winrate": 100 * float(predicted.mean()),
        "lc_standard_error": alpaca_eval.standard_error(100 * predicted),
    }


def _difficulties(gamed: Gamed, count: int, places: Sequence[int] | None) -> np.ndarray:
    known = len(gamed.of_instruction)
    if places is None:
        if count != known:
            raise InputError(
                f"length-controlled: {count} annotations, and difficulties of {known} "
                "instructions: give the evaluation set that they are of (--questions)"
            )
        return gamed.of_instruction
    if len(places) != count or max(places) >= known:
        raise InputError(
            f"length-controlled: no difficulty of instruction {max(places)} of {known}"
        )
    return gamed.of_instruction[list(places)]


def _fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of the logistic regression with an L1 penalty on `targets` [n] in [0, 1] (NaN is
    left out), the penalty chosen by cross-validation. A share is fitted as one row for it, with its
    weight, and one against it, with the rest."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold
    except ModuleNotFoundError as error:
        raise InputError(f"needs {error.name}: pip install 'llama2rt[benchmarks]'") from None
    kept = ~np.isnan(targets)
    if kept.sum() < FOLDS:
        raise InputError(
            f"length-controlled: expected {FOLDS} preferences or more, got {kept.sum()}"
        )
    features, targets, weights = features[kept], targets[kept], weights[kept]
    both = np.concatenate([features, features])
    label = np.repeat([1, 0], len(targets))
    share, weight = np.r_[targets, 1 - targets], np.r_[weights, weights]

    def fitted(strength: float, rows: np.ndarray) -> np.ndarray:
        model = LogisticRegression(
            C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=SEED
        )
        model.fit(both[rows], label[rows], sample_weight=(share * weight)[rows])
        return np.asarray(model.coef_[0])

    def loss(coefficients: np.ndarray, rows: np.ndarray) -> float:
        predicted = 1 / (1 + np.exp(-both[rows] @ coefficients))
        predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
        true = np.where(label[rows] == 1, share[rows], 1 - share[rows])
        each = true * np.log(predicted) + (1 - true) * np.log(1 - predicted)
        return -float((each * weight[rows]).mean())

    # The two rows of one target stay in one fold.
    groups = np.tile(np.arange(len(targets)), 2)
    folds = list(GroupKFold(FOLDS).split(both, label, groups))
    losses = [sum(loss(fitted(c, train), test) for train, test in folds) for c in STRENGTHS]
    return fitted(float(STRENGTHS[int(np.argmin(losses))]), np.arange(len(both)))
