"""AlpacaEval's, MT-Bench's and Arena-Hard's numbers beside their own, on the same made judgements.

    pip install --target build/peers --no-deps alpaca-eval==0.6.6 fschat==0.2.36 \\
        patsy==1.0.3 scikit-learn==1.9.1 joblib threadpoolctl \\
        cloudpickle narwhals
    python -P benchmarks/evaluation/chat_benchmarks.py build/peers --out RECORD.json

AlpacaEval: the package's `get_length_controlled_winrate`, regularised and minimal, on annotations
of whole and weighted preferences and ties; its download of df_gamed.csv is answered with a
made table. MT-Bench: files that this project writes are read by FastChat's own `load_questions`,
`load_model_answers`, `load_judge_prompts` and `check_data`, and its `show_result` prints the means.
Arena-Hard is no package: what its show_result.py computes is restated here (v0.1 at 0489bf3, v2.0
at 005ac12), its regression with scikit-learn.

Stand-ins are imported for libraries that the packages load and these functions do not use. Prints
the largest differences, and what tests/evaluate/test_chat_benchmarks.py keeps.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import math
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import length_control_cases
import records

from llama2rt import atomic
from llama2rt.evaluate.chat_benchmarks import alpaca_eval, arena_hard, length_control, mt_bench
from llama2rt.evaluate.chat_benchmarks.records import Answered, Question
from llama2rt.evaluate.judges.speakers import Reply

INSTRUCTIONS = 60


def made_gamed(path: Path, seed: int) -> np.ndarray:
    """A table as df_gamed.csv, with its difficulties."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=INSTRUCTIONS).round(6)
    lines = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    for model, sign in (("concise", 1), ("verbose", -1)):
        for i in range(INSTRUCTIONS):
            length = sign * abs(generator.normal())
            won = np.clip(generator.normal(0.5 - 0.2 * sign, 0.2), 0, 1)
            lines.append(f"{won:.6f},{i},{length:.6f},{difficulty[i]},False,{model}")
    path.write_text("\n".join(lines) + "\n")
    return difficulty


def made_annotations(difficulty: np.ndarray, seed: int, *, whole: bool) -> list[dict[str, Any]]:
    """Of a judge that likes length; `whole`: without weights between 1 and 2."""
    generator = np.random.default_rng(seed)
    found = []
    for i, hard in enumerate(difficulty):
        lengths = generator.integers(5, 80, 2)
        logit = 0.4 + 0.03 * (lengths[1] - lengths[0]) + 0.5 * hard
        value = 1 + float(np.clip(1 / (1 + math.exp(-logit)) + 0.2 * generator.normal(), 0, 1))
        if whole:
            value = [float(round(value)), 1.5, 0.0][0 if i % 9 else 1 + i % 2]
        found.append(
            {
                "instruction": f"q{i}",
                "output_1": "x" * int(lengths[0]),
                "generator_1": "base",
                "output_2": "y" * int(lengths[1]),
                "generator_2": "model",
                "annotator": "judge",
                "preference": value,
            }
        )
    return found


def package(peers: Path) -> Any:
    """The package's module of the win rate, without what its __init__ imports."""
    sys.path.insert(0, str(peers))
    for name in ("alpaca_eval", "alpaca_eval.metrics"):
        module = types.ModuleType(name)
        module.__path__ = [str(peers / name.replace(".", "/"))]
        sys.modules[name] = module
    data = types.ModuleType("datasets")
    vars(data)["Dataset"] = type("Dataset", (), {})
    sys.modules["datasets"] = data
    for name in ("pkg_resources", "alpaca_eval.constants", "huggingface_hub"):
        sys.modules[name] = MagicMock()
    vars(sys.modules["alpaca_eval"])["constants"] = sys.modules["alpaca_eval.constants"]
    return importlib.import_module("alpaca_eval.metrics.glm_winrate")


def compare_alpaca_eval(peers: Path, folder: Path) -> tuple[float, dict[str, Any]]:
    """(largest difference of any number, the example that the tests keep)."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of scikit-learn 1.10
    glm = package(peers)
    table, worst, example = folder / "gamed.csv", 0.0, {}
    glm.hf_hub_download = lambda **_: str(table)
    for case in ("example", 0, 1, 2):
        if case == "example":
            annotations = length_control_cases.annotations()
            length_control_cases.gamed(table)
        else:
            difficulty = made_gamed(table, case)
            annotations = made_annotations(difficulty, case, whole=case == 1)
        forms = {"length_controlled_v1": length_control.read_gamed(table)}
        for form, gamed in {**forms, "length_controlled_minimal": None}.items():
            theirs = glm.get_length_controlled_winrate(
                [dict(a) for a in annotations], glm_name=form, save_weights_dir=None
            )
            ours = alpaca_eval.win_rate(annotations)
            ours |= length_control.length_controlled(annotations, gamed)
            for key, value in theirs.items():
                worst = max(worst, abs(float(value) - float(ours[key])))
            if case == "example":
                example[form] = {key: float(value) for key, value in theirs.items()}
    return worst, example


def compare_mt_bench(peers: Path, folder: Path) -> float:
    """Largest difference of a mean; AssertionError where a reader refuses or reads otherwise."""
    for name in ("openai", "anthropic", "fastchat.model.model_adapter", "fastchat.model"):
        sys.modules[name] = MagicMock()
    common = importlib.import_module("fastchat.llm_judge.common")
    show = importlib.import_module("fastchat.llm_judge.show_result")
    questions = [
        Question(i, ("first?", "second?"), "math" if i % 3 == 0 else "writing") for i in range(12)
    ]
    rows = [
        {"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in questions
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, model in enumerate(("m1", "m2", "judge")):
        answered = [Answered(q, (Reply(f"{q.id} {number}"), Reply("second"))) for q in questions]
        where = "reference_answer" if model == "judge" else "model_answer"
        mt_bench.write_answers(folder / where / f"{model}.jsonl", model, answered)
    prompts = [
        {
            "name": name,
            "type": "single",
            "system_prompt": "grade",
            "prompt_template": mt_bench.OWN[key].user,
            "description": "",
            "category": "general",
            "output_format": "[[rating]]",
        }
        for key, name in mt_bench.NAMES.items()
    ]
    (folder / "judge_prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    judgments = []
    generator = np.random.default_rng(0)
    for model in ("m1", "m2"):
        for q in questions:
            for turn in (1, 2):
                text = f"so: [[{generator.integers(1, 11)}]]" if generator.random() > 0.1 else "?"
                judgments.append(
                    {
                        "question_id": q.id,
                        "model": model,
                        "judge": ["judge", "single-v1"],
                        "user_prompt": "",
                        "judgment": text,
                        "score": mt_bench.grade(text),
                        "turn": turn,
                        "tstamp": 0.0,
                    }
                )
    judged = folder / "judge_single.jsonl"
    judged.write_text("".join(json.dumps(j) + "\n" for j in judgments))
    # Theirs reads ours ...
    read = common.load_questions(str(folder / "question.jsonl"), None, None)
    answers = common.load_model_answers(str(folder / "model_answer"))
    references = common.load_model_answers(str(folder / "reference_answer"))
    loaded = common.load_judge_prompts(str(folder / "judge_prompts.jsonl"))
    gen = importlib.import_module("fastchat.llm_judge.gen_judgment")
    judges = gen.make_judge_single("judge", loaded)
    common.check_data(read, answers, references, ["m1", "m2"], judges)
    assert answers["m2"][3]["choices"][0]["turns"] == ["3 1", "second"]
    # ... and ours reads what both have.
    assert mt_bench.read_questions(folder / "question.jsonl") == questions
    assert set(mt_bench.read_prompts(folder / "judge_prompts.jsonl")) == set(mt_bench.OWN)
    said = io.StringIO()
    arguments = argparse.Namespace(
        input_file=str(judged), bench_name="mt_bench", judge_model="judge", model_list=None
    )
    with contextlib.redirect_stdout(said):
        show.display_result_single(arguments)
    ours = {row["model"]: row for row in mt_bench.scores(mt_bench.read_judgments(judged))}
    worst = 0.0
    blocks = said.getvalue().split("##########")
    for name, block in zip(("first_turn", "second_turn", "average"), blocks[2::2], strict=True):
        for line in block.splitlines():
            cells = line.split()
            if cells and cells[0] in ours:
                worst = max(worst, abs(float(cells[-1]) - ours[cells[0]][name]["mean"]))
    return worst


def made_arena(layout: arena_hard.Layout, seed: int) -> list[dict[str, Any]]:
    labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A", None]
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(40):
        games = [{"score": labels[generator.choice(6, p=[0.1, 0.2, 0.2, 0.2, 0.25, 0.05])]}]
        games.append({"score": labels[generator.choice(6, p=[0.3, 0.2, 0.2, 0.2, 0.05, 0.05])]})
        rows.append({layout.id: f"u{i}", "model": "m", "category": "hard_prompt", "games": games})
    return rows


def restated_v01(rows: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Score and bounds of v0.1: battles with weights, Bradley-Terry by logistic regression on pairs
    (a tie is a battle won by each), 100 resamples of battles from the seed 42."""
    import pandas as pd
    from sklearn.linear_model import LogisticRegression

    battles = []
    for row in rows:
        for number, game in enumerate(row["games"]):
            label = game["score"]
            if label is None:
                continue
            first_wins = {"A": True, "B": False}.get(label[0]) if "=" not in label else None
            winner = "tie"
            if first_wins is not None:
                baseline_is_first = number == 0
                winner = "baseline" if first_wins == baseline_is_first else "model"
            battles += [winner] * (3 if ">>" in label else 1)

    def win_rate(winners: Any) -> float:
        twice = np.concatenate([winners, winners])
        sign = math.log(10) * np.stack([np.ones(len(twice)), -np.ones(len(twice))], axis=1)
        target = (twice == "baseline").astype(float)
        target[: len(winners)][winners == "tie"] = 1
        fit = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-8).fit(sign, target)
        base, model = 400 * fit.coef_[0]
        return 100 / (1 + 10 ** ((base - model) / 400))

    winners = pd.DataFrame({"winner": battles})
    np.random.seed(42)
    drawn = [
        win_rate(winners.sample(frac=1.0, replace=True)["winner"].to_numpy()) for _ in range(100)
    ]
    score = win_rate(winners["winner"].to_numpy())
    return score, [float(end) for end in np.percentile(drawn, (2.5, 97.5))]


def restated_v2(rows: list[dict[str, Any]]) -> float:
    """Mean of v2.0: each label as scores of its second game's A, three where much better."""
    to = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0] * 3}
    scores = []
    for row in rows:
        first, second = (game["score"] for game in row["games"])
        if first is not None and second is not None:
            scores += to[second] + [1 - s for s in to[first]]
    return 100 * float(np.mean(scores))


def compare_arena_hard() -> dict[str, float]:
    worst = {"v0.1 score": 0.0, "v0.1 bounds": 0.0, "v2.0 score": 0.0}
    for seed in range(3):
        rows = made_arena(arena_hard.LAYOUTS["v0.1"], seed)
        (ours,) = arena_hard.scores(rows, arena_hard.LAYOUTS["v0.1"])
        score, bounds = restated_v01(rows)
        worst["v0.1 score"] = max(worst["v0.1 score"], abs(score - ours["score"]))
        apart = np.abs(np.array(bounds) - ours["bounds"]).max()
        worst["v0.1 bounds"] = max(worst["v0.1 bounds"], float(apart))
        rows = made_arena(arena_hard.LAYOUTS["v2.0"], seed)
        (ours,) = arena_hard.scores(rows, arena_hard.LAYOUTS["v2.0"])
        worst["v2.0 score"] = max(worst["v2.0 score"], abs(restated_v2(rows) - ours["score"]))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peers", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alpaca, example = compare_alpaca_eval(given.peers, folder)
        record = {
            **records.header("cpu"),
            "peers": {
                name: importlib.metadata.version(name)
                for name in ("alpaca-eval", "fschat", "scikit-learn", "patsy")
            },
            "largest_difference": {
                "alpaca_eval": alpaca,
                "mt_bench": compare_mt_bench(given.peers, folder),
                "arena_hard": compare_arena_hard(),
            },
            "alpaca_eval": example,
        }
    atomic.write(given.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["largest_difference"], indent=2))


if __name__ == "__main__":
    main()
