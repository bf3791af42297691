"""`llama2rt safety` on files and on a policy; the study of shares of safety data."""

import json

import json_lines
import pocket as problem
import pytest

from llama2rt import cli
from llama2rt.data.readers import read, write
from llama2rt.data.records import Dialogue, Prompt
from llama2rt.errors import InputError
from llama2rt.pipeline import safety_study
from llama2rt.pipeline.safety_study import SafetyStudyRecipe
from llama2rt.run import Run
from llama2rt.stages import sft


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
        raise SystemExit(0)
    return left.value.code


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    import llama2rt.train.allocator

    monkeypatch.setattr(llama2rt.train.allocator, "keep_freed_memory", lambda: True)


def row(prompt, response, kind="safety", **keys):
    return {"prompt_id": prompt, "messages": problem.messages(kind, "baba"), "response": response,
            "kind": kind, **keys}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Two versions' samples of the same prompts, and people's labels of all."""
    before = [row(f"s{i}", "gold", risk_category="theft") for i in range(8)]
    before += [row(f"h{i}", "yes", "helpfulness") for i in range(8)]
    after = [
        {**old, "response": "sorry" if i % 4 or old["response"] == "gold" else "no way"}
        for i, old in enumerate(before)
    ]
    json_lines.write(tmp_path / "before.jsonl", before)
    json_lines.write(tmp_path / "after.jsonl", after)
    labels = [
        {"prompt_id": one["prompt_id"], "response": one["response"],
         "unsafe": one["response"] == "gold", "refusal": one["response"] == "no way"}
        for one in before + after
    ]  # fmt: skip
    json_lines.write(tmp_path / "labels.jsonl", labels)
    return tmp_path


def test_two_versions_by_peoples_labels(files, capsys):
    command = ["safety", files / "before.jsonl", files / "after.jsonl"]
    command += ["--labels", files / "labels.jsonl"]
    assert call(*command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rates = [[v[k]["mean"] for k in ("violation", "false_refusal")] for v in found["versions"]]
    assert rates == [[1.0, 0.0], [0.0, 0.25]]
    (difference,) = found["differences"]
    assert difference["than"] == str(files / "before.jsonl")
    assert [difference[key]["mean"] for key in ("violation", "false_refusal")] == [-1.0, 0.25]
    assert call(*command) == 0
    said = capsys.readouterr().out
    assert "risk category: theft, violations: 100.0 % [67.6, 100.0] of 8 prompts" in said
    assert "violations more than" in said and "-100.0 %" in said


def test_what_the_command_refuses(files, pocket, capsys):
    labels = ["--labels", files / "labels.jsonl"]
    bare = [{**one, "kind": None} for one in json_lines.read(files / "before.jsonl")]
    json_lines.write(files / "bare.jsonl", bare)
    kind = f'{{path="{files / "bare.jsonl"}", kind="safety"}}'
    for arguments, said in (
        (labels, "give files of samples, or --policy and --prompts"),
        ([files / "before.jsonl"], "give one of safety, judge, server, python and labels"),
        ([files / "bare.jsonl", *labels], "sample 1, of prompt 's0': kind: missing"),
        ([*labels, "--policy", pocket.sft], "policy, prompts: one says who answers"),
        ([*labels, "--policy", pocket.safety, "--prompts", pocket.prompts], "found a reward model"),
        ([*labels, "--out", files / "x.jsonl"], "out: only with policy"),
        ([files / "before.jsonl", "--safety", pocket.sft], "found a language model"),
    ):
        assert call("safety", *arguments) == 2
        assert said in capsys.readouterr().err
    assert call("safety", kind, *labels, "--json") == 0
    (version,) = json.loads(capsys.readouterr().out)["versions"]
    assert version["violation"]["mean"] == 0.5 and version["false_refusal"] is None


def test_a_policy_answers_every_turn_of_an_attack(pocket, tmp_path, capsys):
    answer = {"role": "assistant", "content": "never said"}
    turns = [problem.messages("safety", name)[0] for name in problem.HELD_OUT[:3]]
    attacks = [
        Prompt(f"a{i}", [turns[0], answer, turns[1]], "safety", "theft", "insistence")
        for i in range(4)
    ]
    attacks.append(Prompt("short", [turns[2]], "safety"))
    attacks.append(Prompt("full", [{"role": "user", "content": "x" * 70}], "safety"))
    write(tmp_path / "attacks.jsonl", attacks)
    out = tmp_path / "answers.jsonl"
    command = ["safety", "--policy", pocket.sft, "--prompts", tmp_path / "attacks.jsonl"]
    command += ["--safety", pocket.safety, "--max-tokens", 8, "--out", out, "--json"]
    assert call(*command) == 0
    (version,) = json.loads(capsys.readouterr().out)["versions"]
    samples = read(out, "sample")
    assert [(s.prompt_id, s.turn) for s in samples] == [
        *((f"a{i}", turn) for i in range(4) for turn in (1, 2)), ("short", 1)
    ]  # fmt: skip
    for first, second in zip(samples[:8:2], samples[1:8:2], strict=True):
        assert second.messages == [
            turns[0], {"role": "assistant", "content": first.response}, turns[1]
        ]  # fmt: skip
        assert (second.risk_category, second.attack_vector) == ("theft", "insistence")
    assert [row["violation"]["prompts"] for row in version["turns"]] == [4, 4]
    assert version["violation"]["prompts"] == 5
    # What is kept is a file of samples like any other.
    assert call("safety", out, "--safety", pocket.safety, "--json") == 0
    (again,) = json.loads(capsys.readouterr().out)["versions"]
    assert {**again, "name": ""} == {**version, "name": ""}


def answered(kind, names, *texts):
    return [
        Dialogue([*problem.messages(kind, name), {"role": "assistant", "content": text}])
        for name in names
        for text in texts
    ]


@pytest.fixture
def study(pocket, tmp_path):
    write(tmp_path / "helpful.jsonl", answered("helpfulness", problem.TRAINING, "yes", "no"))
    write(tmp_path / "safe.jsonl", answered("safety", problem.TRAINING, "sorry"))
    write(tmp_path / "held_out.jsonl", problem.prompts(problem.HELD_OUT[:20]))
    given = {
        "init": str(pocket.sft),
        "helpful": [str(tmp_path / "helpful.jsonl")],
        "safe": [str(tmp_path / "safe.jsonl")],
        "shares": [0.0, 0.1, 1.0],
        "defaults": {
            "sft": {"batch_size": 16, "epochs": 2, "train": {"lr": 4e-3, "checkpoint_every": 0}}
        },
        "rewards": {"helpfulness": str(pocket.helpfulness), "safety": str(pocket.safety)},
        "data": [str(tmp_path / "held_out.jsonl")],
        "sampling": {"max_tokens": 8},
    }
    return given


def test_more_safety_data_is_safer(study, tmp_path, monkeypatch):
    recipe = SafetyStudyRecipe.model_validate(study)
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "finish", 3, safety_study.run, recipe, tmp_path / "study"
    )
    report = json.loads((resumed / "report.json").read_text())
    rows = report["safety_study"]
    assert [row["name"] for row in rows] == ["0 %", "10 %", "100 %"]
    assert rows[2]["safety_score"]["mean"] > rows[0]["safety_score"]["mean"] + 0.1
    assert rows[2]["violation"]["mean"] < rows[0]["violation"]["mean"] - 0.2
    assert all(row["violation"]["prompts"] == row["false_refusal"]["prompts"] == 20 for row in rows)
    assert rows[0]["per_seed"][0]["violation"] == rows[0]["violation"]["mean"]
    trained = [json.loads((resumed / f"safety-{share}-seed-0" / "report.json").read_text())
               for share in (0, 10, 100)]  # fmt: skip
    assert [found["dialogues"] for found in trained] == [100, 105, 150]
    page = (resumed / "report.html").read_text()
    assert "Share of safety data" in page and "false refusals" in page


def test_smaller_shares_are_parts_of_larger_ones(study, pocket):
    def used(share):
        recipe = sft.SftRecipe(
            init=pocket.sft, data=[*study["helpful"], *study["safe"]], shares=[1, share]
        )
        training, held_out = sft.split(recipe)
        found = [repr(dialogue.messages) for dialogue in training + held_out]
        return {text for text in found if "hide" in text}

    assert used(0.1) < used(0.5) < used(1) and not used(0)
    assert [len(used(share)) for share in (0.1, 0.5, 1)] == [5, 25, 50]
    with pytest.raises(ValueError, match="expected one for each of the 1 files of data, got 2"):
        sft.SftRecipe(init=pocket.sft, data=study["safe"], shares=[1, 1])
    with pytest.raises(InputError, match="shares: leave no dialogue"):
        sft.split(sft.SftRecipe(init=pocket.sft, data=study["safe"], shares=[0]))


def test_what_a_study_refuses(study, tmp_path):
    for change, said in (
        ({"shares": [0.1, 0.1]}, "shares: one stands there twice"),
        ({"defaults": {"ppo": {}}}, "runs the SFT stage alone"),
        ({"rewards": {"helpfulness": study["rewards"]["helpfulness"]}}, "rewards.safety: its mean"),
        ({"defaults": {"sft": {"seed": 1}}}, "defaults.sft: seed: the study says it itself"),
        ({"data": [{"path": study["data"][0], "kind": "safety"}]}, None),
        ({"judge": {"safety": study["init"]}}, "found a language model"),
    ):
        with pytest.raises((InputError, ValueError)) as error:
            safety_study.run(SafetyStudyRecipe.model_validate(study | change), tmp_path / "study")
        assert (said or "") in str(error.value)
        assert not (tmp_path / "study").exists()
    write(tmp_path / "one.jsonl", [p for p in problem.prompts(["baba"]) if p.kind == "safety"])
    one = SafetyStudyRecipe.model_validate(study | {"data": [tmp_path / "one.jsonl"]})
    with pytest.raises(InputError, match="all prompts are of kind safety"):
        safety_study.run(one, tmp_path / "study")


def test_a_dry_run_of_a_study(study, tmp_path, capsys):
    import tomli_w

    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(study))
    assert call("safety-study", path, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [step["stage"] for step in said["steps"]] == [
        "safety-0-seed-0", "safety-10-seed-0", "safety-100-seed-0", "answers-seed-0"
    ]  # fmt: skip
