"""The shipped plans, V1 to V5 on the toy and on GSM8K: their data and their course."""

import json
from decimal import Decimal
from pathlib import Path

import json_lines
import pytest

from llama2rt import cli
from llama2rt.data.readers import read
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.pipeline import iterate
from llama2rt.pipeline.plan import resolve
from llama2rt.prepare import command, gsm8k
from llama2rt.stages import STAGES

TOY, GSM8K = "v1-v5-toy", "v1-v5-gsm8k"


def planned(name: str, directory: Path) -> dict:
    """The recipes of a shipped plan's steps by name."""
    recipe = iterate.IterateRecipe.model_validate(cli.read_recipe(cli.find_recipe(name)))
    return {step.name: step.recipe for step in resolve(iterate.Plan(recipe).steps(), directory)}


def dry_run(name: str, capsys) -> str:
    """What the command says of a shipped plan whose data is in the working directory."""
    cli.main(["iterate", name, "--dry-run"])
    return capsys.readouterr().out


def problems(folder: Path, count: int = 90) -> Path:
    """Files like GSM8K's, of sums: the second model solution is wrong."""
    folder.mkdir()

    def question(i: int) -> str:
        return f"Ann has {i} coins and gets {i % 7} more. How many has she?"

    def solution(i: int, total: int, end: str) -> str:
        return f"She has {i} + {i % 7} = <<{i}+{i % 7}={total}>>{total} coins.\n{end} {total:,}"

    rows = [
        {"question": question(i), "answer": solution(i, i + i % 7, "####")}
        for i in range(900, 900 + 2 * count)
    ]
    (folder / gsm8k.TRAINING).write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {
            "question": question(i),
            "ground_truth": solution(i, i + i % 7, "A:"),
            "small": {"is_correct": True, "solution": solution(i, i + i % 7, "A:")},
            "large": {"is_correct": False, "solution": solution(i, i + 9, "A:")},
        }
        for i in range(2000, 2000 + count)
    ]
    (folder / gsm8k.SOLUTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_toy_runs_the_papers_course(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.prepare(TOY, out=Path("runs/toy"), smoke_test=True)
    assert "steps, " in dry_run(TOY, capsys)
    plan = planned(TOY, tmp_path)
    base, chat = (tmp_path / name / "model" for name in ("pretrained", "chat"))
    versions = ["RLHF-V1", "RLHF-V2", "RLHF-V3", "RLHF-V4", "RLHF-V5-rejection"]
    policies = ["SFT-distilled", "RLHF-V1", "RLHF-V2", "RLHF-V3-GAtt", "RLHF-V4"]
    for number, (name, policy) in enumerate(zip(versions, policies, strict=True), start=1):
        version = plan[name]
        assert (version.init, version.policy) == (base, tmp_path / policy / "model")
        assert len(version.earlier) == (number - 1 if number > 3 else 0)
        assert len(version.tune.temperatures) > 1
        for kind in ("helpfulness", "safety"):
            trained = tmp_path / f"{kind}-{number}" / "model"
            assert getattr(version.rewards, kind) == trained
            assert len(plan[f"{kind}-{number}"].data) == number  # all batches so far
        collected = plan[f"comparisons-{number}"]
        assert collected.asked == 1000 * (number - 1)
        answers = chat if number == 1 else tmp_path / policy / "model"
        assert collected.policy == answers
    assert plan["RLHF-V3-GAtt"].policy == tmp_path / "RLHF-V3" / "model"
    assert plan["RLHF-V3-GAtt"].recall.turns == [2, 4, 6, 20]
    assert tmp_path / "RLHF-V3-GAtt" / "dialogues.jsonl" in plan["RLHF-V4"].dialogues
    final = plan["RLHF-V5"]
    assert final.init == tmp_path / "RLHF-V5-rejection" / "model" and final.reference == chat
    assert plan["SFT-distilled"].init == chat
    # Each batch of comparisons asks prompts that no other one does, and there are enough.
    from llama2rt.prepare import toy

    assert toy.sizes(0).quickstart.preference_prompts == 5 * collected.prompts


def test_what_is_prepared_is_the_same_again_and_no_other(tmp_path, capsys):
    out = tmp_path / "toy"
    command.prepare(TOY, out=out, smoke_test=True, as_json=True)
    first = json.loads(capsys.readouterr().out)
    (out / "data" / "turns.jsonl").unlink()  # as after a kill
    command.prepare(TOY, out=out, smoke_test=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == first and "data/turns.jsonl" in first["files"]
    with pytest.raises(InputError, match="was prepared otherwise"):
        command.prepare(TOY, out=out, smoke_test=True, seed=1)
    with pytest.raises(InputError, match="not empty"):
        command.prepare(TOY, out=tmp_path, smoke_test=True)
    with pytest.raises(InputError, match="source: the folder of GSM8K's files"):
        command.prepare(GSM8K, out=tmp_path / "none")
    with pytest.raises(InputError, match="source"):
        command.prepare(TOY, out=tmp_path / "none", source=tmp_path)
    assert not (tmp_path / "none").exists()


def test_gsm8k_is_divided_by_question(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = problems(tmp_path / "source")
    out = Path("runs/gsm8k")
    command.prepare(GSM8K, out=out, source=source, smoke_test=True)
    asked = {p.messages[0]["content"] for p in read(out / "data" / "evaluation.jsonl", "prompt")}
    compared = {
        part: {c.prompt[0]["content"] for c in read(out / "data" / f"{part}.jsonl", "comparison")}
        for part in ("comparisons", "comparisons-held-out")
    }
    trained = {d.messages[0]["content"] for d in read(out / "data" / "dialogues.jsonl", "dialogue")}
    assert compared["comparisons-held-out"] == asked and len(asked) == 30
    assert not (compared["comparisons"] | trained) & asked and len(compared["comparisons"]) == 60
    texts = "".join(path.read_text() for path in (out / "data").iterdir())
    assert "<<" not in texts and "A: " not in texts and "#### 2" in texts
    worth = gsm8k.exact(out / "judge" / "answers.json")
    for prompt in read(out / "data" / "evaluation.jsonl", "prompt"):
        first = int(prompt.messages[0]["content"].split()[2])
        right = first + first % 7
        assert worth(prompt, f"It is 3.\n#### {right:,}") == 1.0
        assert worth(prompt, f"#### {right}\n#### {right + 1}") == 0.0
        assert worth(prompt, str(right)) == 0.0
    assert "steps, " in dry_run(GSM8K, capsys)
    plan = planned(GSM8K, tmp_path)
    sampled = [n for n, r in plan.items() if isinstance(r, STAGES["rejection"].recipe)]
    assert sampled == ["RLHF-V1", "RLHF-V2", "RLHF-V3", "RLHF-V4", "RLHF-V5-rejection"]
    assert [len(plan[name].earlier) for name in sampled] == [0, 0, 0, 3, 4]
    assert plan["RLHF-V1"].rewards.safety is None
    final = plan["RLHF-V5"]
    assert final.init == tmp_path / "RLHF-V5-rejection" / "model"
    assert final.reference == tmp_path / "chat" / "model" and final.rewards.safety is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("so\n#### 1,072.50", Decimal("1072.5")),
        ("#### $-3.", -3),
        ("#### 5 #### 6", 6),
        ("72", None),
        ("#### .,.", None),
        ("#### none", None),
    ],
)
def test_the_final_answer_of_a_solution(text, number):
    assert gsm8k.final_answer(text) == number


def test_real_files_are_divided(tmp_path, shared_data):
    source = shared_data(gsm8k.TRAINING).parent
    shared_data(gsm8k.SOLUTIONS)
    gsm8k.write(tmp_path, source, gsm8k.smoke(0))
    finals = gsm8k.final_answers(source / gsm8k.SOLUTIONS)
    assert len(finals) == 1319
    rows = json_lines.read(source / gsm8k.SOLUTIONS)
    # The file's own marks of its four models' solutions are what the judge says.
    names = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    (tmp_path / "answers.json").write_text(json.dumps(finals))
    worth = gsm8k.exact(tmp_path / "answers.json")
    agree = [
        (worth(Prompt(row["question"], []), row[name]["solution"].replace("\nA: ", "\n#### ")) == 1)
        == row[name]["is_correct"]
        for row in rows
        for name in names
    ]
    assert len(agree) == 4 * 1319 and sum(agree) / len(agree) > 0.99


def test_files_that_are_not_gsm8ks_are_refused(tmp_path):
    source = problems(tmp_path / "source", 4)
    path = source / gsm8k.SOLUTIONS
    path.write_text(path.read_text().replace("A: 2,007", "B"))
    with pytest.raises(InputError, match=r"solutions\.jsonl:\d: expected question"):
        gsm8k.write(tmp_path / "out", source, gsm8k.smoke(0))
    with pytest.raises(InputError, match="No such file"):
        gsm8k.write(tmp_path / "out", tmp_path / "nowhere", gsm8k.smoke(0))
    assert not (tmp_path / "out").exists()


def test_another_source_or_a_broken_mark_is_refused(tmp_path):
    first, second = problems(tmp_path / "first"), problems(tmp_path / "second", 91)
    out = tmp_path / "out"
    command.prepare(GSM8K, out=out, source=first, smoke_test=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="out: was prepared otherwise"):
        command.prepare(GSM8K, out=out, source=second, smoke_test=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / command.MARK).write_text("")
    with pytest.raises(InputError, match=r"prepared\.json: not JSON"):
        command.prepare(GSM8K, out=out, source=first, smoke_test=True)
    with pytest.raises(InputError, match="expected a folder"):
        command.prepare(GSM8K, out=first / gsm8k.TRAINING, source=first)
    with pytest.raises(InputError, match=f"{gsm8k.TRAINING}: no such file"):
        command.prepare(GSM8K, out=tmp_path / "other", source=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_the_last_problem_counts_without_a_newline_behind_it(tmp_path):
    path = problems(tmp_path / "source", 3) / gsm8k.SOLUTIONS
    whole = gsm8k.final_answers(path)
    path.write_text(path.read_text().removesuffix("\n"))
    assert gsm8k.final_answers(path) == whole and len(whole) == 3
    path.write_text("{\n")
    with pytest.raises(InputError, match=r":1: not JSON"):
        gsm8k.final_answers(path)


def test_a_prompt_without_a_known_answer_is_named(tmp_path):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"a": "7"}))
    worth = gsm8k.exact(answers)
    assert worth(Prompt("a", []), "#### 7") == 1
    with pytest.raises(InputError, match="no answer to the prompt 'b'"):
        worth(Prompt("b", []), "#### 7")
