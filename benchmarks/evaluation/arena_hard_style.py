"""Arena-Hard's style control beside its own code, on the same files.

    git clone https://github.com/lmarena/arena-hard-auto
    git -C arena-hard-auto worktree add ../v0.1 0489bf3
    git -C arena-hard-auto worktree add ../v2.0 005ac12
    pip install pandas tqdm scikit-learn
    python -P benchmarks/evaluation/arena_hard_style.py --v0.1 v0.1 --v2.0 v2.0 --out RECORD.json

Its show_result.py reads made judgements and answers (`helpers/arena_hard_cases.py`) from the
folders that it expects and fits them; what it prints rounded is taken before it is rounded. In
v2.0, which draws without a seed, numpy's is set to ours. Stand-ins are imported for what it loads
and does not need here. Prints the largest differences, in percentage points of a win rate; the
record has its own figures too, which tests/evaluate/test_style_control.py keeps.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import arena_hard_cases
import records

from llama2rt import atomic
from llama2rt.evaluate.chat_benchmarks import arena_hard, style_control
from llama2rt.evaluate.chat_benchmarks.arena_hard import LAYOUTS

CONTROLS: dict[str, tuple[style_control.Control, ...]] = {
    "both": ("length", "markdown"),
    "length": ("length",),
    "markdown": ("markdown",),
}
Rows = dict[str, dict[str, Any]]


@contextlib.contextmanager
def checkout(folder: Path, stand_ins: dict[str, types.ModuleType]) -> Any:
    """`show_result` of a checkout."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder.resolve()))
    sys.modules.update(stand_ins)
    try:
        yield importlib.import_module("show_result")
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("show_result", "utils", "utils_math"):
                del sys.modules[name]


def module(name: str, **members: Any) -> types.ModuleType:
    found = types.ModuleType(name)
    vars(found).update(members)
    return found


def theirs_v01(folder: Path) -> dict[str, Rows]:
    """By control and model: score and bounds, in per cent, and coefficients of style. Run where the
    files are."""
    stand_ins = {"utils": module("utils", load_model_answers=None)}
    found: dict[str, Rows] = {}
    with checkout(folder, stand_ins) as show:
        own = importlib.import_module("utils_math")
        battles = show.get_battles_from_judgment(
            "arena-hard-v0.1", "judge", baseline_model="base", style_control=True
        )
        for name, elements, ratio in (
            ("both", own.STYLE_CONTROL_ELEMENTS, [1, 1, 1, 1]),
            ("length", own.LENGTH_CONTROL_ELEMENTS, [1]),
            ("markdown", own.MARKDOWN_CONTROL_ELEMENTS, [1, 1, 1]),
        ):
            np.random.seed(42)  # as on import, before one fit a process
            X, Y, models = own.construct_style_matrices(
                battles, apply_ratio=ratio, style_elements=elements
            )
            fitted, style = own.fit_bt(X, Y, models, baseline_model="base")
            drawn, _ = own.get_bootstrap_result_style_control(
                X, Y, battles, models, own.fit_bt, num_round=100, baseline_model="base"
            )
            found[name] = {}
            for model in arena_hard_cases.MODELS:
                ends = [np.percentile(drawn[model], end) for end in (2.5, 97.5)]
                # get_win_rate_column, before it rounds to hundredths
                rate = [
                    100 * own.predict_win_rate({"base": 1114.0, model: elo})["base"][model]
                    for elo in (fitted[model], *ends)
                ]
                found[name][model] = {
                    "score": rate[0],
                    "bounds": rate[1:],
                    # Its sign is of model_a, the baseline, whose style stands first there.
                    "style": style.tolist(),
                }
    return found


def theirs_v2(folder: Path) -> dict[str, Rows]:
    """As `theirs_v01`; of both controls together, which alone work there."""
    settings = {"hard_prompt": {"baseline": "base"}}
    stand_ins = {"utils.judge_utils": module("utils.judge_utils", JUDGE_SETTINGS=settings)}
    with checkout(folder, stand_ins) as show:
        battles = show.load_judgments(["judge"], "arena-hard-v2.0")
        tables: list[Any] = []
        own = show.format_confidence_interval
        show.format_confidence_interval = lambda *parts: tables.append(parts) or own(*parts)
        said: list[Any] = []
        fit = show.bootstrap_pairwise_model

        def fitted(*arguments: Any, **options: Any) -> Any:
            said.append(fit(*arguments, **options))
            return said[-1]

        show.bootstrap_pairwise_model = fitted
        np.random.seed(arena_hard.SEED)
        show.print_leaderboard_with_style_features(
            battles, "arena-hard-v2.0", "hard_prompt", ["length", "markdown"]
        )
    (scores, lower, upper), ((coefficients, _),) = tables[0], said
    style = coefficients[:, -4:].quantile(0.5, 0)
    columns = [table.set_index("model") for table in (scores, lower, upper)]
    rows = {
        model: {
            "score": 100 * float(columns[0]["scores"][model]),
            "bounds": [
                100 * float(columns[1]["lower"][model]),
                100 * float(columns[2]["upper"][model]),
            ],
            "style": style.tolist(),
        }
        for model in arena_hard_cases.MODELS
    }
    return {"both": rows}


def ours(version: str, judgments: Path, answers: list[Path]) -> dict[str, Rows]:
    layout = LAYOUTS[version]
    read = arena_hard.read_judgments(judgments, layout)
    styles = {s.model: s for s in (style_control.read_styles(path, layout) for path in answers)}
    found = {}
    for name, controls in CONTROLS.items():
        rows = style_control.scores(read, layout, styles, controls, "base")
        named = [style_control.STYLES[i] for c in controls for i in style_control.CONTROLS[c]]
        found[name] = {
            row["model"]: {
                "score": row["score"],
                "bounds": row["bounds"],
                "style": [row[key] for key in named],
            }
            for row in rows
        }
    return found


def apart(own: dict[str, Rows], other: dict[str, Rows]) -> dict[str, float]:
    """Largest differences by figure."""
    worst = dict.fromkeys(("score", "bounds", "style"), 0.0)
    for name, rows in other.items():
        for model, row in rows.items():
            for key in worst:
                difference = np.abs(np.array(row[key]) - np.array(own[name][model][key])).max()
                worst[key] = max(worst[key], float(difference))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--v0.1", dest="v01", type=Path, required=True)
    parser.add_argument("--v2.0", dest="v2", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    checkouts = {"v0.1": (theirs_v01, given.v01.resolve()), "v2.0": (theirs_v2, given.v2.resolve())}
    out, here = given.out.resolve(), Path.cwd()
    worst: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for version, (theirs, folder) in checkouts.items():
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as name:
                files = arena_hard_cases.write(Path(name), version, seed=seed)
                os.chdir(name)
                try:
                    silent = io.StringIO()
                    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                        found = theirs(folder)
                finally:
                    os.chdir(here)
                difference = apart(ours(version, *files), found)
            before = worst.setdefault(version, difference)
            worst[version] = {key: max(before[key], difference[key]) for key in before}
            if seed == 0:
                kept[version] = found
    record = {
        **records.header("cpu"),
        "versions": records.versions(("torch", "scikit-learn", "pandas", "numpy")),
        "largest_difference": worst,
        "seed_0": kept,
    }
    atomic.write(out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(worst, indent=2))


if __name__ == "__main__":
    main()
