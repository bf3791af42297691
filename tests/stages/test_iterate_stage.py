"""V1 ... Vn as one command: parents, pooling, the table, resumption."""

import json

import pocket as problem
import pytest
from pydantic import ValidationError

from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.run import Run
from llama2rt.stages import iterate, loading, phases, rejection
from llama2rt.text import chat

REJECTION = {"samples": 3, "epochs": 1, "batch_size": 16, "train": {"lr": 2e-3}}
PPO = {"iterations": 2, "batch_size": 16, "mini_batch_size": 8, "train": {"lr": 1e-3}}
DPO = {"iterations": 1, "samples": 2, "batch_size": 16, "train": {"lr": 1e-3}}


def recipe(pocket, **settings) -> iterate.IterateRecipe:
    given = {
        "sft": pocket.sft,
        "helpfulness": pocket.helpfulness,
        "safety": pocket.safety,
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "max_tokens": 8,
        "pool_from": 2,
        "steps": [
            {"name": "V1", "stage": "rejection", "settings": REJECTION},
            {"name": "V2", "stage": "rejection", "settings": REJECTION},
            {"name": "V2-ppo", "stage": "ppo", "settings": PPO},
            {"name": "dpo", "stage": "dpo", "parent": "sft", "settings": DPO},
        ],
    }
    return iterate.IterateRecipe(**(given | settings))


def test_versions_build_on_each_other_and_resume(pocket, tmp_path, monkeypatch):
    settings = recipe(pocket)
    whole = iterate.run(settings, tmp_path / "whole" / "run")
    root = tmp_path / "whole" / "run"
    report = json.loads((root / "report.json").read_text())
    assert [row["name"] for row in report["versions"]] == ["sft", "V1", "V2", "V2-ppo", "dpo"]
    assert report["versions"][0]["kl_k1"] == 0.0
    assert report["versions"][2]["reward"] > report["versions"][0]["reward"]
    assert whole == root / "dpo" / "model"
    steps = {n: json.loads((root / n / "manifest.json").read_text()) for n in ("V1", "V2", "dpo")}
    assert steps["V1"]["recipe"]["earlier"] == []
    assert steps["V2"]["recipe"]["earlier"] == [str(root / "V1")]
    assert steps["V2"]["recipe"]["policy"] == str(root / "V1" / "model")
    assert steps["V2"]["recipe"]["init"] == str(pocket.sft)
    assert steps["dpo"]["recipe"]["init"] == str(pocket.sft)

    other = tmp_path / "killed" / "run"
    problem.killed_and_resumed(monkeypatch, Run, "log", 20, iterate.run, settings, other)
    for name in ("V1", "V2", "V2-ppo", "dpo"):
        assert problem.weights(root / name / "model") == problem.weights(other / name / "model")
    again = json.loads((other / "report.json").read_text())
    for row in report["versions"] + again["versions"]:
        del row["model"]
    assert again == report


def test_a_wrong_setting_is_found_before_anything_runs(pocket, tmp_path):
    steps = [
        {"name": "V1", "stage": "rejection", "settings": REJECTION},
        {"name": "V2", "stage": "ppo", "settings": {"clipp": 0.2}},
    ]
    with pytest.raises(InputError, match="steps: V2: clipp"):
        iterate.run(recipe(pocket, steps=steps), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pooling_starts_where_the_recipe_says(pocket, tmp_path):
    steps = [{"name": f"V{i}", "stage": "rejection"} for i in range(1, 6)]
    settings = recipe(pocket, steps=steps, pool_from=4)
    plan = [iterate.stage_recipe(settings, i, tmp_path) for i in range(5)]
    assert all(isinstance(step, rejection.RejectionRecipe) for step in plan)
    assert [len(step.earlier) for step in plan] == [0, 0, 0, 3, 4]
    assert len({step.seed for step in plan}) == 5


def test_pi0_is_sft_whatever_a_step_starts_from(pocket, tmp_path):
    stages = ("rejection", "dpo", "ppo", "dpo")
    steps = [{"name": f"V{i}", "stage": stage} for i, stage in enumerate(stages)]
    settings = recipe(pocket, steps=steps, base=tmp_path / "base")
    plan = [iterate.stage_recipe(settings, i, tmp_path) for i in range(4)]
    assert [step.reference for step in plan] == [pocket.sft] * 4
    starts = [tmp_path / "base", *(tmp_path / f"V{i}" / "model" for i in range(3))]
    assert [step.init for step in plan] == starts


def test_what_a_begun_plan_takes(pocket, tmp_path):
    steps = [{"name": "V1", "stage": "rejection", "settings": REJECTION}]
    begun = recipe(pocket, steps=steps)
    Run.open(tmp_path, begun)

    def resume(*changed):
        return Run.open(tmp_path, recipe(pocket, steps=list(changed)), resume=True)

    settings = {**REJECTION, "train": {**REJECTION["train"], "log_every": 7}}
    logged = {**steps[0], "settings": settings}
    resume(logged, {"name": "V2", "stage": "ppo"}).finish()
    assert resume(logged, {"name": "V2", "stage": "ppo"}).complete
    assert not resume(
        logged, {"name": "V2", "stage": "ppo"}, {"name": "V3", "stage": "dpo"}
    ).complete
    for refused in (
        [{**steps[0], "name": "V9"}],
        [{**logged, "settings": {**settings, "samples": 4}}],
        [logged],
    ):
        with pytest.raises(InputError, match="asked to resume with"):
            resume(*refused)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"name": "sft", "stage": "ppo"}], "'sft' is taken"),
        (
            [{"name": "V1", "stage": "ppo", "parent": "V2"}, {"name": "V2", "stage": "ppo"}],
            "parent 'V2' is no earlier step",
        ),
        ([{"name": "a/b", "stage": "ppo"}], "'a/b' is taken or no folder name"),
        ([], "at least 1 item"),
    ],
)
def test_impossible_plans_are_refused(pocket, steps, said):
    with pytest.raises(ValidationError, match=said):
        recipe(pocket, steps=steps)


def test_all_versions_are_measured_on_the_same_prompts(pocket, tmp_path, monkeypatch):
    """V1 comes from a base of a shorter context, which one of the prompts fills."""
    sft, tokenizer = loading.load_llama(pocket.sft)
    shape = LlamaConfig(**dict(vars(sft.config), context=32))
    native.save(Llama(shape).initialize(1), tokenizer, tmp_path / "base")
    asked = [{"role": "user", "content": f"may baba visit {again}"} for again in ("", "baba " * 5)]
    write(tmp_path / "held_out.jsonl", [Prompt(m["content"], [m]) for m in asked])
    lengths = [len(chat.encode_prompt(tokenizer, [message])) for message in asked]
    assert lengths[0] < 24 and 32 <= lengths[1] < 56
    measured = {}

    def measure(path, engine, reference, reward_models, prompts, **_):
        measured[path] = prompts
        return {}

    monkeypatch.setattr(phases, "measure", measure)
    settings = {"base": tmp_path / "base", "validation": [tmp_path / "held_out.jsonl"]}
    steps = [{"name": "V1", "stage": "rejection", "settings": {"samples": 1, "epochs": 1}}]
    iterate.run(recipe(pocket, steps=steps, **settings), tmp_path / "run")
    rows = [measured[tmp_path / "run" / "samples" / f"{name}.jsonl"] for name in ("sft", "V1")]
    assert [[prompt.id for prompt in row] for row in rows] == [["may baba visit "]] * 2
