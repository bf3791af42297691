"""MT-Bench's pairwise mode: from questions to win rates, how it counts, and faults."""

import json

import json_lines
import pytest
from judge_server import ChatServer
from mt_bench_questions import MT_BENCH_QUESTIONS

from llama2rt import cli
from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks import mt_bench, mt_bench_pairs


@pytest.mark.parametrize(
    ("judgment", "meant"),
    [
        ("so [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]] it is", "tie"),
        ("[[A]] at first, but [[B]]", "error"),
        ("A", "error"),
    ],
)
def test_verdicts(judgment, meant):
    assert mt_bench_pairs.verdict(judgment) == meant


def record(first, second, models=("m", "base"), question=1):
    names = {"question_id": question, "model_1": models[0], "model_2": models[1]}
    return {**names, "g1_winner": first, "g2_winner": second, "judge": ["j", "pair-v2"]}


def test_counts():
    judged = [
        record("model_1", "model_1", question=1),
        record("model_2", "model_2", question=2),
        record("model_1", "model_2", question=3),
        record("tie", "tie", question=4),
        record("tie", "model_1", question=5),
        record("model_1", "model_1", question=6),
        record("error", "model_1", question=7),
        record("model_2", "model_2", ("m", "other"), question=1),
    ]
    row = mt_bench_pairs.scores(judged, "base")[0]
    assert row["model"] == "m" and (row["win"], row["loss"], row["tie"]) == (2, 1, 3)
    assert row["win_rate_adjusted"]["mean"] == pytest.approx(3.5 / 6)
    assert row["win_rate"] == pytest.approx(2 / 6) and row["loss_rate"] == pytest.approx(1 / 6)
    # First places: one each in the games of 1, 2, 6, both in those of 3, ties in 4 and half of 5.
    assert row["first"] == pytest.approx((1 + 1 + 2 + 1 + 0.5 + 1) / 12)
    assert row["flipped"] == pytest.approx(1 / 6) and row["errors"] == 1
    rows = {r["model"]: r for r in mt_bench_pairs.scores(judged)}
    assert rows["m"]["loss"] == 2 and rows["other"]["win"] == 1 and rows["base"]["win"] == 1
    with pytest.raises(InputError, match="nothing is judged against x"):
        mt_bench_pairs.scores(judged, "x")
    with pytest.raises(InputError, match="no judgement of m has a verdict"):
        mt_bench_pairs.scores([judged[6]])


def test_intervals_hold_their_mean_where_questions_have_one_turn_or_two():
    won, lost = ("model_1", "model_1"), ("model_2", "model_2")
    pairs = [{**record(*won, question=q), "turn": t} for q in range(40) for t in (1, 2)]
    pairs += [{**record(*lost, question=q), "turn": 1} for q in range(40, 80)]
    found = mt_bench_pairs.scores(pairs, "base")[0]["win_rate_adjusted"]
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["low"] < 0.6 < found["mean"] < 0.72 < found["high"]
    grades = [
        {"question_id": p["question_id"], "model": "m", "turn": p["turn"]}
        | {"score": 10 if p["g1_winner"] == "model_1" else 1}
        for p in pairs
    ]
    average = mt_bench.scores(grades)[0]["average"]
    assert average["mean"] == pytest.approx(7)
    assert average["low"] < 6.5 < average["mean"] < 7.4 < average["high"]


def run(capsys, *arguments):
    cli.main(["benchmark", *map(str, arguments)])
    return capsys.readouterr().out


def judge(body):
    """Prefers the longer second answer, else the first place; says so in the benchmark's labels."""
    asked = body["messages"][-1]["content"]
    if "Answer of A:" in asked:
        a, b = asked.split("Answer of A:\n")[1].split("\n\nAnswer of B:\n")
        b = b.split("\n\nSay first")[0]
    else:
        a = asked.split("A's second answer:\n")[1].split("\n\nB's first")[0]
        b = asked.split("B's second answer:\n")[1].split("\n\nSay first")[0]
    return "They differ. [[A]]" if len(a) >= len(b) else "They differ. [[B]]"


def test_from_questions_to_win_rates(tmp_path, capsys):
    questions = tmp_path / "question.jsonl"
    json_lines.write(questions, MT_BENCH_QUESTIONS)
    said = {"long": ["much longer", "and longer"], "short": ["tiny", "tiny"]}
    said["same"] = ["much longer", "tiny"]
    for model, turns in said.items():
        answers = [
            {
                "question_id": row["question_id"],
                "model_id": model,
                "choices": [{"index": 0, "turns": turns[: len(row["turns"])]}],
            }
            for row in MT_BENCH_QUESTIONS
        ]
        json_lines.write(tmp_path / f"{model}.jsonl", answers)
    judged = [tmp_path / f"{model}_pair.jsonl" for model in ("long", "same")]
    with ChatServer(judge).running() as server:
        for path, model in zip(judged, ("long", "same"), strict=True):
            given = ("judge", "mt-bench", questions, "--answers", tmp_path / f"{model}.jsonl")
            given += ("--baseline", tmp_path / "short.jsonl", "--out", path)
            run(capsys, *given, "--server", server.url)
        sent = server.sent
        run(capsys, *given, "--server", server.url)
        assert server.sent == sent == 2 * 2 * 5
    written = json_lines.read(judged[0])
    assert [(r["question_id"], r["turn"]) for r in written] == [
        (81, 1), (82, 1), (83, 1), (81, 2), (82, 2),
    ]  # fmt: skip
    assert written[1]["judge"][1] == "llama2rt-pair-math-v1"
    assert "A right answer" in written[1]["g1_user_prompt"]
    assert "A's second answer:\nand longer" in written[3]["g1_user_prompt"]
    assert "B's second answer:\nand longer" in written[3]["g2_user_prompt"]
    found = json.loads(run(capsys, "score", "mt-bench", *judged, "--baseline", "short", "--json"))
    best, other = found["models"]
    assert best["model"] == "long" and (best["win"], best["tie"], best["first"]) == (5, 0, 0.5)
    # Of equal second answers this judge takes the first one that it is shown.
    assert (other["win"], other["tie"], other["flipped"]) == (3, 2, 0.4)
    assert "win_rate_adjusted 0.80" in run(capsys, "score", "mt-bench", *judged).splitlines()[1]


def test_faults(tmp_path):
    path = tmp_path / "file.jsonl"
    good = record("tie", "tie")
    for rows, said in (
        ([good, {**good, "g2_winner": "A"}], "2: g2_winner: expected model_1, model_2, tie, error"),
        ([{**good, "model_2": "m"}], "1: model_2: 'm' is model_1 too"),
        ([{"question_id": 1}], "1: missing key 'model_1'"),
    ):
        json_lines.write(path, rows)
        with pytest.raises(InputError, match=rf"file.jsonl:{said}"):
            mt_bench_pairs.read_judgments(path)
    prompts = [
        {
            "name": name,
            "type": "pairwise",
            "system_prompt": "compare",
            "prompt_template": mt_bench_pairs.OWN[key].user,
            "output_format": "[[A]]",
        }
        for key, name in mt_bench_pairs.NAMES.items()
    ]
    json_lines.write(path, prompts)
    read = mt_bench.read_prompts(path, mt_bench_pairs.NAMES, mt_bench_pairs.FORMAT)
    assert read[2, True].user == mt_bench_pairs.OWN[2, True].user
    json_lines.write(path, [{**prompts[0], "output_format": "[[rating_a,rating_b]]"}])
    with pytest.raises(InputError, match=r"file.jsonl:1: output_format: expected '\[\[A\]\]'"):
        mt_bench.read_prompts(path, mt_bench_pairs.NAMES, mt_bench_pairs.FORMAT)
