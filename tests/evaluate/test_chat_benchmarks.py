"""AlpacaEval 2, MT-Bench, Arena-Hard: their numbers, their files, and faults in these."""

import json

import json_lines
import length_control_cases
import numpy as np
import pytest
from judge_server import ChatServer
from mt_bench_questions import MT_BENCH_QUESTIONS

from llama2rt import cli
from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks import alpaca_eval, arena_hard, length_control, mt_bench
from llama2rt.evaluate.chat_benchmarks.arena_hard import LAYOUTS

V1, V2 = LAYOUTS["v0.1"], LAYOUTS["v2.0"]
# What alpaca-eval 0.6.6 with scikit-learn 1.9.1 gives for length_control_cases
# (benchmarks/evaluation/chat_benchmarks.py, which prints it).
PACKAGE = {
    "length_controlled_v1": {
        "win_rate": 37.916666666666664,
        "standard_error": 9.642439598677372,
        "n_wins": 2.0,
        "n_wins_base": 5.0,
        "n_draws": 5.0,
        "n_total": 12.0,
        "discrete_win_rate": 37.5,
        "length_controlled_winrate": 40.91147224767555,
        "lc_standard_error": 0.7314858344404123,
    },
    "length_controlled_minimal": {
        "win_rate": 37.916666666666664,
        "standard_error": 9.642439598677372,
        "n_wins": 2.0,
        "n_wins_base": 5.0,
        "n_draws": 5.0,
        "n_total": 12.0,
        "discrete_win_rate": 37.5,
        "length_controlled_winrate": 40.911547776497656,
        "lc_standard_error": 1.6737241846796126e-15,
    },
}


def test_the_length_controlled_win_rate_is_the_packages(tmp_path):
    judged = length_control_cases.annotations()
    found = alpaca_eval.win_rate(judged)
    table = length_control.read_gamed(length_control_cases.gamed(tmp_path / "df_gamed.csv"))
    for form, of in (("length_controlled_v1", table), ("length_controlled_minimal", None)):
        numbers = found | length_control.length_controlled(judged, of)
        expected = PACKAGE[form]
        assert {key: numbers[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    # An instruction's difficulty is that of its place, which need not be its row.
    for places, same in ((range(12), True), (range(11, -1, -1), False)):
        placed = length_control.length_controlled(judged, table, list(places))
        whole = PACKAGE["length_controlled_v1"]["length_controlled_winrate"]
        assert (abs(placed["length_controlled_winrate"] - whole) < 1e-9) == same
    with pytest.raises(InputError, match="expected 5 preferences or more, got 4"):
        length_control.length_controlled(judged[:4], None)
    with pytest.raises(InputError, match=r"9 annotations, and difficulties of 12 .*--questions"):
        length_control.length_controlled(judged[3:], table)
    same = [{**a, "output_1": "x", "output_2": "yy"} for a in judged]
    with pytest.raises(InputError, match="differ by the same length"):
        length_control.length_controlled(same, table)
    for line, said in (
        ("0.5,0,x,0.1,False,m", r":26: not a row of df_gamed.csv \(could not convert"),
        ("0.5,0,0.1,9.0,False,m", r":26: not a row.*0 has two difficulties"),
        ("0.5,30,0.1,9.0,False,m", ":1: index: expected the instructions' places"),
    ):
        path = length_control_cases.gamed(tmp_path / "wrong.csv")
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(InputError, match=rf"wrong.csv{said}"):
            length_control.read_gamed(path)


@pytest.mark.parametrize(
    ("judgment", "grade"),
    [
        ("Grade: [[7]]", 7),
        ("[[3]] then [[9]]", 3),
        ("[8.5]", 8.5),
        ("as in [2], so [[6]]", 6),
        ("[[0]]", mt_bench.UNREADABLE),
        ("[[11]]", mt_bench.UNREADABLE),
        ("[[8/10]]", mt_bench.UNREADABLE),
        ("eight", mt_bench.UNREADABLE),
    ],
)
def test_grades(judgment, grade):
    assert mt_bench.grade(judgment) == grade


@pytest.mark.parametrize(
    ("judgment", "old", "new"),
    [
        ("[[A>>B]]", "A>>B", "A>>B"),
        ("[[A>B]] no, [[B>A]]", None, "B>A"),
        ("so [[a=b]]", None, "A=B"),
        ("so [B>>A]", None, "B>>A"),
        ("none", None, None),
    ],
)
def test_labels(judgment, old, new):
    assert arena_hard.label(judgment, "v0.1") == old
    assert arena_hard.label(judgment, "v2.0") == new


def battle(first, second, layout=V1, **more):
    games = [{"score": first}, {"score": second}]
    return {layout.id: "u", "model": "m", "category": "c", "games": games, **more}


def test_much_better_is_three_battles_and_the_second_game_is_the_other_way_round():
    # The model is B in the first game and A in the second.
    (row,) = arena_hard.scores([battle("B>>A", "A>B"), battle("A>B", "A=B")], V1)
    assert row["battles"] == 6 and row["score"] == pytest.approx(100 * 4.5 / 6)
    lacking = [battle("B>A", None, layout, judge="j") for layout in (V1, V2)]
    whole = [battle("B<A", "A>B", V2), lacking[1]]
    (row,) = arena_hard.scores([lacking[0]], V1)
    assert row["score"] == 100 and row["unreadable"] == 1
    (row,) = arena_hard.scores(whole, V2)
    assert row["battles"] == 2 and row["score"] == 50 and row["unreadable"] == 1
    with pytest.raises(InputError, match="no judgement of m has a label"):
        arena_hard.scores([battle(None, None)], V1)
    # Copies of a verdict are no news: drawn as battles the bounds are closer than over questions.
    many = [battle("B>>A", "A>>B") if i % 2 else battle("A>>B", "B>>A") for i in range(30)]
    (row,) = arena_hard.scores(many, V1)
    by_battle, by_question = (row[key][1] - row[key][0] for key in ("bounds", "interval"))
    assert by_question > 1.5 * by_battle


def reply(body):
    """Grades, labels and letters, by what it is asked; otherwise how long the conversation is."""
    system = body["messages"][0]["content"]
    asked = body["messages"][-1]["content"]
    if "grade" in system:
        return f"It is fine. Grade: [[{5 + len(asked) % 3}]]"
    if "compare" in system:
        return "Both work. [[B>A]]"
    if "Which answer is" in asked:
        return "A"
    return f"{len(body['messages'])} messages"


def run(capsys, *arguments):
    cli.main(["benchmark", *map(str, arguments)])
    return capsys.readouterr().out


def test_mt_bench_from_questions_to_scores(tmp_path, capsys):
    questions = tmp_path / "question.jsonl"
    json_lines.write(questions, MT_BENCH_QUESTIONS)
    answers, judged = tmp_path / "model_answer" / "toy.jsonl", tmp_path / "j_single.jsonl"
    with ChatServer(reply).running() as server:
        where = ("--server", server.url)
        run(capsys, "answer", "mt-bench", questions, "--out", answers, *where, "--system", "short")
        heats = {b["messages"][1]["content"]: b["temperature"] for b in server.asked}
        assert heats == {"write": 0.7, "1+1": 0.0, "why": 0.1}
        given = ("judge", "mt-bench", questions, "--answers", answers, "--out", judged, *where)
        run(capsys, *given)
        sent = server.sent
        run(capsys, *given)
        assert server.sent == sent == 5 + 5
    written = json_lines.read(answers)
    assert written[0]["choices"] == [{"index": 0, "turns": ["2 messages", "4 messages"]}]
    verdicts = json_lines.read(judged)
    assert [(v["question_id"], v["turn"]) for v in verdicts] == [
        (81, 1),
        (82, 1),
        (83, 1),
        (81, 2),
        (82, 2),
    ]
    assert "4" in verdicts[4]["user_prompt"].split("A right answer")[2]
    (row,) = json.loads(run(capsys, "score", "mt-bench", judged, "--json"))["models"]
    mean = np.mean([v["score"] for v in verdicts])
    assert row["model"] == "toy" and row["average"]["mean"] == pytest.approx(mean)
    assert row["first_turn"]["mean"] == pytest.approx(np.mean([v["score"] for v in verdicts[:3]]))
    with pytest.raises(SystemExit) as left:
        run(capsys, "score", "mt-bench", judged, "--baseline", "toy")
    said = "baseline: these judgements are of single answers"
    assert left.value.code == 2 and said in capsys.readouterr().err
    bare = [{k: v for k, v in row.items() if k != "reference"} for row in MT_BENCH_QUESTIONS]
    json_lines.write(questions, bare)
    with pytest.raises(SystemExit) as left:
        run(capsys, *given, "--server-model", "any")
    assert (
        left.value.code == 2
        and "question 82 (math): its judge is shown right answers" in capsys.readouterr().err
    )


@pytest.mark.parametrize("layout", [V1, V2], ids=["v0.1", "v2.0"])
def test_arena_hard_from_questions_to_scores(layout, tmp_path, capsys):
    name = f"arena-hard-{layout.version}"
    questions, answers = tmp_path / "question.jsonl", tmp_path / "toy.jsonl"
    texts = ["one", "two", "three"]
    if layout is V1:
        rows = [
            {"question_id": t, "category": "c", "cluster": "x", "turns": [{"content": t}]}
            for t in texts
        ]
    else:
        rows = [
            {"uid": t, "category": "hard_prompt", "subcategory": "x", "prompt": t} for t in texts
        ]
    json_lines.write(questions, rows)
    judged = tmp_path / "judgment.jsonl"
    with ChatServer(reply).running() as server:
        where = ("--server", server.url)
        run(capsys, "answer", name, questions, "--out", answers, *where, "--name", "toy")
        baseline = tmp_path / "base.jsonl"
        baseline.write_text(answers.read_text())
        given = ("judge", name, questions, "--answers", answers, "--baseline", baseline)
        run(capsys, *given, "--out", judged, *where)
    assert arena_hard.read_answers(answers, layout).turns["two"] == ("1 messages",)
    (row,) = json.loads(run(capsys, "score", name, judged, "--json"))["models"]
    # B is better in both games: each side wins one.
    assert row["score"] == 50 and row["battles"] == 6 and row["model"] == "toy"
    first = json_lines.read(judged)[0]
    assert [game["score"] for game in first["games"]] == ["B>A", "B>A"]
    if layout is V2:
        assert first["baseline"] == "base" and first["category"] == "hard_prompt"
        assert first["games"][0]["judgment"]["answer"].endswith("[[B>A]]")
    json_lines.write(judged, [first, {**first, "games": [{"score": "C"}, None]}])
    with pytest.raises(InputError, match=r"judgment.jsonl:2: score: expected a label"):
        arena_hard.read_judgments(judged, layout)


def test_alpaca_eval_from_outputs_to_a_win_rate(tmp_path, capsys):
    base, ours, judged = (
        tmp_path / name for name in ("base.json", "ours.json", "annotations.json")
    )
    outputs = [
        {"dataset": "d", "instruction": f"q{i}", "output": "base " * (i + 1), "generator": "base"}
        for i in range(6)
    ]
    base.write_text(json.dumps(outputs))
    with ChatServer(reply).running() as server:
        where = ("--server", server.url)
        run(capsys, "answer", "alpaca-eval", base, "--out", ours, *where)
        given = ("judge", "alpaca-eval", base, "--answers", ours, "--baseline", base)
        run(capsys, *given, "--out", judged, *where)
        found = json.loads(judged.read_text())
        assert {a["preference"] for a in found} == {1.5}  # the first one, in both orders
        assert found[0]["output_2"] == "1 messages" and found[0]["generator_1"] == "base"
        run(capsys, *given, "--out", tmp_path / "graded.json", *where, "--graded")
    assert "length_controlled" not in run(capsys, "score", "alpaca-eval", judged, "--plain")
    text = run(capsys, "score", "alpaca-eval", judged)
    assert "win_rate 50.00" in text and "length_controlled_winrate 50.00" in text
    assert alpaca_eval.read_annotations(judged)[3]["instruction"] == "q3"


def test_a_judgement_read_twice_is_refused(tmp_path, capsys):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    grade = {"question_id": 81, "model": "m", "judge": ["j", "single-v1"], "score": 5, "turn": 1}
    won = {"g1_winner": "model_1", "g2_winner": "model_1", "judge": ["j", "pair-v2"], "turn": 1}
    pair = {"question_id": 81, "model_1": "m", "model_2": "n", **won}
    turned = {**pair, "model_1": "n", "model_2": "m"}
    game = battle("A>B", "B>A", judge="j")
    cases = [
        ("mt-bench", grade, grade, {**grade, "turn": 2}, "question 81, turn 1 of m"),
        ("mt-bench", pair, turned, {**pair, "turn": 2}, "question 81, turn 1 of "),
        ("arena-hard-v0.1", game, game, {**game, "question_id": "w"}, "question 'u' of m"),
        ("arena-hard-v2.0", {**game, "uid": "u"}, {**game, "uid": "u"}, {**game, "uid": "w"},
         "question 'u' of m"),
    ]  # fmt: skip
    for benchmark, row, again, fresh, said in cases:
        judges = {**again, "judge": ["k"] if isinstance(again["judge"], list) else "k"}
        json_lines.write(path, [row, fresh, judges])
        run(capsys, "score", benchmark, path)
        json_lines.write(other, [again])
        for given in ((path, path), (path, other)):
            with pytest.raises(SystemExit) as left:
                run(capsys, "score", benchmark, *given)
            error = capsys.readouterr().err
            assert left.value.code == 2 and f"{given[1]}:1: {said}" in error
            assert f"judged in {path}:1 too" in error
    # Two files of one model's answers: neither counts silently.
    counts = {"header_count": {"h1": 0}, "list_count": {"ordered": 0}, "bold_count": {"**": 0}}
    answer = {"question_id": "u", "model_id": "m", "conv_metadata": {"token_len": 1, **counts}}
    files = [tmp_path / folder / "m.jsonl" for folder in "xy"]
    for file in files:
        file.parent.mkdir()
        json_lines.write(file, [answer])
    json_lines.write(path, [game])
    given = ("--control", "length", "--baseline", "n", "--answers", *files)
    with pytest.raises(SystemExit) as left:
        run(capsys, "score", "arena-hard-v0.1", path, *given)
    said = f"answers: {files[1]}: another file has answers of 'm' too"
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_faults_are_named_by_their_line(tmp_path):
    path = tmp_path / "file.jsonl"
    good = {"question_id": 1, "turns": ["a"]}
    outputs = {"instruction": "a", "output": "", "generator": "m"}
    note = length_control_cases.annotations()[0]
    cases = [
        (mt_bench.read_questions, [good, good], "2: question_id: 1 is that of"),
        (mt_bench.read_questions, [{"question_id": 1}], "1: missing key 'turns'"),
        (mt_bench.read_questions, [{"question_id": 1, "turns": []}], "1: turns: expected a list"),
        (
            mt_bench.read_questions,
            [{"question_id": 1, "turns": ["a"] * 3}],
            "1: turns: expected one",
        ),
        (
            mt_bench.read_questions,
            [{"question_id": 1.5, "turns": ["a"]}],
            "1: question_id: expected",
        ),
        (mt_bench.read_answers, [{"question_id": 1, "model_id": "m", "choices": []}], "1: choices"),
        (mt_bench.read_prompts, [], "1: no records"),
        (alpaca_eval.read_questions, [{"instruction": " "}], "1: instruction: expected text"),
        (
            alpaca_eval.read_answers,
            [outputs, {**outputs, "instruction": "b", "generator": "n"}],
            "2: generator",
        ),
        (
            alpaca_eval.read_annotations,
            [note, {**note, "preference": 2.5}],
            "2: preference: expected 1 to 2",
        ),
        (
            alpaca_eval.read_annotations,
            [note, {**note, "annotator": "x"}],
            "2: annotator: expected 'judge'",
        ),
        (
            lambda p: arena_hard.read_questions(p, V1),
            [{"question_id": 1, "turns": ["a"]}],
            "1: turns",
        ),
        (
            lambda p: arena_hard.read_answers(p, V2),
            [{"uid": 1, "model": "m", "messages": []}],
            "1: expected messages",
        ),
        (
            lambda p: arena_hard.read_judgments(p, V1),
            [{"question_id": 1, "model": "m", "games": []}],
            "1: games: expected two",
        ),
    ]
    for read, rows, said in cases:
        json_lines.write(path, rows)
        with pytest.raises(InputError, match=rf"file.jsonl:{said}"):
            read(path)
    path.write_text('{"instruction": ')
    with pytest.raises(InputError, match=r"file.jsonl:1: invalid JSON"):
        alpaca_eval.read_questions(path)


def test_what_is_not_used_is_said(tmp_path, caplog):
    path = tmp_path / "file.jsonl"
    json_lines.write(path, [{"question_id": 1, "turns": ["a"], "other": 1}])
    mt_bench.read_questions(path)
    assert "key not used: other (1 rows)" in caplog.text
