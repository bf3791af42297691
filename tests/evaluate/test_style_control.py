"""Arena-Hard's style control: its own code's numbers, what it controls for, and faults."""

import json

import arena_hard_cases
import json_lines
import numpy as np
import pytest

from llama2rt import cli
from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks import arena_hard, style_control
from llama2rt.evaluate.chat_benchmarks.arena_hard import LAYOUTS

V1, V2 = LAYOUTS["v0.1"], LAYOUTS["v2.0"]
BOTH = ("length", "markdown")
# What arena-hard-auto gives for arena_hard_cases of seed 0, by control and model: score, bounds and
# the coefficients of style (benchmarks/evaluation/arena_hard_style.py, which records it).
OWN_CODE = {
    "v0.1": {
        "both": {
            "plain": (75.472813, [45.720918, 88.699008], [3.127802, -0.256603, 0.098838, 0.13219]),
            "rich": (54.38985, [35.67177, 80.758509], [3.127802, -0.256603, 0.098838, 0.13219]),
        },
        "length": {
            "plain": (78.71508, [70.317171, 86.436385], [3.199014]),
            "rich": (49.972221, [40.506703, 62.20452], [3.199014]),
        },
        "markdown": {
            "plain": (26.108205, [8.019685, 48.579415], [-0.575044, 0.960907, 0.215489]),
            "rich": (85.168716, [72.908251, 95.532016], [-0.575044, 0.960907, 0.215489]),
        },
    },
    "v2.0": {
        "both": {
            "plain": (78.392634, [59.416978, 90.297373], [3.36547, -0.32972, 0.00412, 0.080432]),
            "rich": (59.819239, [36.253073, 78.624241], [3.36547, -0.32972, 0.00412, 0.080432]),
        },
    },
}


@pytest.fixture(autouse=True)
def few_resamples_of_questions(monkeypatch):
    monkeypatch.setattr(style_control, "_QUESTION_ROUNDS", 20)


def case(folder, layout, **more):
    judgments, answers = arena_hard_cases.write(folder, layout.version, **more)
    styles = [style_control.read_styles(path, layout) for path in answers]
    return arena_hard.read_judgments(judgments, layout), {s.model: s for s in styles}


@pytest.mark.parametrize("layout", [V1, V2], ids=["v0.1", "v2.0"])
def test_scores_are_those_of_its_own_code(layout, tmp_path):
    read, styles = case(tmp_path, layout)
    for name, expected in OWN_CODE[layout.version].items():
        controls = BOTH if name == "both" else (name,)
        rows = {r["model"]: r for r in style_control.scores(read, layout, styles, controls, "base")}
        named = [style_control.STYLES[i] for c in controls for i in style_control.CONTROLS[c]]
        for model, (score, bounds, style) in expected.items():
            row = rows[model]
            assert row["score"] == pytest.approx(score, abs=1e-3)
            assert row["bounds"] == pytest.approx(bounds, abs=1e-3)
            assert [row[key] for key in named] == pytest.approx(style, abs=1e-4)
            assert row["interval"][0] < row["score"] < row["interval"][1]


@pytest.mark.parametrize("layout", [V1, V2], ids=["v0.1", "v2.0"])
def test_a_judge_that_likes_length_is_seen_through(layout, tmp_path):
    read, styles = case(tmp_path, layout, questions=150)
    plain = {row["model"]: row["score"] for row in arena_hard.scores(read, layout)}
    rows = style_control.scores(read, layout, styles, ["length"], "base")
    controlled = {row["model"]: row["score"] for row in rows}
    # "plain" is stronger than "rich", which writes four times as much.
    assert plain["plain"] < 50 < plain["rich"]
    assert controlled["plain"] > 50 + 5 and controlled["plain"] > controlled["rich"]
    assert rows[0]["length"] > 0.3


@pytest.mark.parametrize("layout", [V1, V2], ids=["v0.1", "v2.0"])
def test_style_that_never_differs_and_empty_answers(layout, tmp_path):
    read, styles = case(tmp_path, layout)
    plain = arena_hard.scores([j for j in read if j["model"] == "rich"], layout)[0]
    same = {m: style_control.Styles(m, styles["base"].counts) for m in styles}
    (row,) = style_control.scores(
        [j for j in read if j["model"] == "rich"], layout, same, BOTH, "base"
    )
    assert [row[key] for key in style_control.STYLES] == [0, 0, 0, 0]
    # v0.1's penalty draws its score towards 50.
    assert row["score"] == pytest.approx(plain["score"], abs=1 if layout is V1 else 0.5)
    empty = {q: np.zeros(4) for q in styles["rich"].counts}
    styles["rich"] = style_control.Styles("rich", empty)
    for row in style_control.scores(read, layout, styles, BOTH, "base"):
        assert np.isfinite([row["score"], *row["interval"], *row["bounds"]]).all()


def test_faults_of_style_control(tmp_path):
    judgments, answers = arena_hard_cases.write(tmp_path, "v2.0", questions=4)
    read = arena_hard.read_judgments(judgments, V2)
    styles = {s.model: s for s in (style_control.read_styles(p, V2) for p in answers)}
    with pytest.raises(InputError, match="judgements do not name it"):
        style_control.scores(read, V2, styles, BOTH)
    with pytest.raises(InputError, match=r"no answers of rich: give its file too"):
        style_control.scores(read, V2, {k: styles[k] for k in ("base", "plain")}, BOTH, "base")
    two = [{**judgment, "baseline": f"b{i % 2}"} for i, judgment in enumerate(read)]
    with pytest.raises(InputError, match="expected one in a category, found b0, b1"):
        style_control.scores(two, V2, styles, BOTH)
    lacking = {**styles, "base": style_control.Styles("base", {})}
    with pytest.raises(InputError, match="base has no answer to question 'q"):
        style_control.scores(read, V2, lacking, BOTH, "base")
    rows = json_lines.read(answers[0])
    for value in ({"token_len": 3}, None, {**rows[0]["metadata"], "bold_count": {"**": -1}}):
        json_lines.write(tmp_path / "m.jsonl", [{**rows[0], "metadata": value}])
        with pytest.raises(InputError, match=r"m.jsonl:1: metadata: "):
            style_control.read_styles(tmp_path / "m.jsonl", V2)


def test_style_control_on_the_command_line(tmp_path, capsys):
    judgments, answers = arena_hard_cases.write(tmp_path, "v0.1", questions=12)
    given = ["benchmark", "score", "arena-hard-v0.1", str(judgments)]
    control = ["--control", "length", "markdown", "--answers", *map(str, answers)]
    cli.main([*given, *control, "--baseline", "base", "--json"])
    rows = json.loads(capsys.readouterr().out)["models"]
    assert {row["model"] for row in rows} == {"plain", "rich"} and "bold" in rows[0]
    for arguments, said in (
        (control, "judgements do not name it"),
        (control[:3], "control and answers: expected both or neither"),
        (["--baseline", "base"], "baseline: expected with --control"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main([*given, *arguments])
        assert left.value.code == 2 and said in capsys.readouterr().err
