"""V1 ... Vn as one command: who builds on whom, refresh, references, the table, resumption."""

import json
import os
import tomllib
from pathlib import Path

import kill_plan
import pocket as problem
import pytest
import tomli_w
from processes import run_python
from pydantic import ValidationError

from llama2rt import cli
from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue, Prompt
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.pipeline import iterate
from llama2rt.pipeline.keys import table_type
from llama2rt.pipeline.plan import check, resolve
from llama2rt.run import Run, hash_path
from llama2rt.stages import STAGES, evaluate, loading
from llama2rt.text import chat

REJECTION = {"samples": 3, "epochs": 1, "batch_size": 16, "train": {"lr": 2e-3}}
PPO = {"iterations": 2, "batch_size": 16, "mini_batch_size": 8, "train": {"lr": 1e-3}}
DPO = {"iterations": 1, "samples": 2, "batch_size": 16, "train": {"lr": 1e-3}}


def recipe(pocket, **settings) -> iterate.IterateRecipe:
    given = {
        "sft": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness, "safety": pocket.safety},
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling": {"max_tokens": 8},
        "pool_from": 2,
        "steps": [
            {"name": "V1", "stage": "rejection", **REJECTION},
            {"name": "V2", "stage": "rejection", **REJECTION},
            {"name": "V2-ppo", "stage": "ppo", **PPO},
            {"name": "dpo", "stage": "dpo", "init": "@sft", **DPO},
        ],
    }
    return iterate.IterateRecipe.model_validate(given | settings)


def planned(settings: iterate.IterateRecipe, directory) -> dict:
    """The recipes of all steps by name, in order."""
    return {step.name: step.recipe for step in resolve(iterate.Plan(settings).steps(), directory)}


def test_versions_build_on_each_other_and_resume(pocket, tmp_path, monkeypatch):
    settings = recipe(pocket)
    root = tmp_path / "whole" / "run"
    whole = iterate.run(settings, root)
    report = json.loads((root / "report.json").read_text())
    assert [row["name"] for row in report["versions"]] == ["SFT", "V1", "V2", "V2-ppo", "dpo"]
    first, _, second, *_ = report["versions"]
    assert first["kl"]["k1"]["mean"] == 0.0
    assert second["reward"]["mean"] > first["reward"]["mean"]
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
    assert again == report


def test_the_papers_course(pocket, tmp_path):
    plan = planned(recipe(pocket, steps=[], pool_from=4), tmp_path)
    assert list(plan) == [
        *("RLHF-V1", "RLHF-V2", "RLHF-V3", "RLHF-V4", "RLHF-V5-rejection", "RLHF-V5"),
        "versions at RLHF-V5",
    ]
    newest = pocket.sft
    for name in list(plan)[:5]:
        assert (plan[name].policy, plan[name].init) == (newest, pocket.sft)
        newest = tmp_path / name / "model"
    assert plan["RLHF-V5"].init == newest
    pooled = [[folder.name for folder in plan[name].earlier] for name in list(plan)[:5]]
    three = ["RLHF-V1", "RLHF-V2", "RLHF-V3"]
    assert pooled == [[], [], [], three, [*three, "RLHF-V4"]]
    assert {plan[name].rewards.safety for name in list(plan)} == {pocket.safety}
    compared = plan["versions at RLHF-V5"]
    assert list(compared.versions) == ["SFT", *list(plan)[:6]]
    assert [source.path for source in compared.data] == [pocket.validation]
    assert len({step.seed for step in plan.values()}) == len(plan)


def test_reward_models_are_refreshed_before_each_version(pocket, tmp_path):
    annotate = {**kill_plan.DEFAULTS["annotate"], "prompts": 4}
    defaults = {**kill_plan.DEFAULTS, "annotate": annotate}
    settings = recipe(pocket, steps=[], versions=3, pool_from=4, defaults=defaults)
    plan = planned(settings, tmp_path)
    assert list(plan) == [
        *("comparisons-1", "helpfulness-1", "safety-1", "RLHF-V1"),
        *("comparisons-2", "helpfulness-2", "safety-2", "RLHF-V2"),
        *("comparisons-3", "helpfulness-3", "safety-3", "RLHF-V3-rejection", "RLHF-V3"),
        "versions at RLHF-V3",
    ]
    policies = [pocket.sft, tmp_path / "RLHF-V1" / "model", tmp_path / "RLHF-V2" / "model"]
    previous = {"helpfulness": pocket.helpfulness, "safety": pocket.safety}
    for batch, policy in enumerate(policies, start=1):
        collected = plan[f"comparisons-{batch}"]
        assert (collected.policy, collected.asked) == (policy, 4 * (batch - 1))
        assert [source.path for source in collected.held_out] == [pocket.validation]
        so_far = [tmp_path / f"comparisons-{i}" for i in range(1, batch + 1)]
        for kind, other in (("helpfulness", "safety"), ("safety", "helpfulness")):
            reward = plan[f"{kind}-{batch}"]
            assert (reward.kind, reward.init, reward.previous) == (kind, pocket.sft, previous[kind])
            for key, its_kind, part in (
                ("data", kind, "training"),
                ("mixed_in", other, "training"),
                ("validation", kind, "held_out"),
            ):
                paths = [source.path for source in getattr(reward, key)]
                assert paths == [folder / f"{its_kind}-{part}.jsonl" for folder in so_far]
            previous[kind] = tmp_path / f"{kind}-{batch}" / "model"
        version = plan[f"RLHF-V{batch}"]
        assert version.rewards.helpfulness == tmp_path / f"helpfulness-{batch}" / "model"
        assert version.rewards.safety == tmp_path / f"safety-{batch}" / "model"


def test_the_first_reward_models_may_be_the_plans_own(pocket, tmp_path):
    plan = planned(recipe(pocket, steps=[], rewards={}, defaults=kill_plan.DEFAULTS), tmp_path)
    assert plan["helpfulness-1"].previous is None
    assert plan["helpfulness-2"].previous == tmp_path / "helpfulness-1" / "model"
    alone = recipe(pocket, steps=[], rewards={}, defaults=kill_plan.DEFAULTS, kinds=["helpfulness"])
    plan = planned(alone, tmp_path)
    assert "safety-1" not in plan and plan["RLHF-V5"].rewards.safety is None
    with pytest.raises(InputError, match="steps: RLHF-V1: rewards: no helpfulness model is named"):
        planned(recipe(pocket, steps=[], rewards={}), tmp_path)


def test_pi0_is_sft_whatever_a_step_starts_from(pocket, tmp_path):
    stages = ("rejection", "dpo", "ppo", "dpo")
    steps = [{"name": f"V{i}", "stage": stage} for i, stage in enumerate(stages)]
    plan = list(planned(recipe(pocket, steps=steps, base=tmp_path / "base"), tmp_path).values())
    assert [step.reference for step in plan] == [pocket.sft] * 5
    starts = [tmp_path / "base", *(tmp_path / f"V{i}" / "model" for i in range(3))]
    assert [step.init for step in plan[:4]] == starts


def test_names_stand_for_what_steps_leave(pocket, tmp_path):
    steps = [
        {"name": "V1", "stage": "rejection"},
        {"name": "V2", "stage": "rejection", "policy": "@sft", "init": "@base"},
        {
            "name": "E",
            "stage": "evaluate",
            "versions": {"first": "@V1", "start": "@sft"},
            "data": [{"path": "@V1/samples/best.jsonl", "kind": "safety"}],
            "rewards": {"safety": "@sft/reward"},
        },
    ]
    plan = planned(recipe(pocket, steps=steps, base=tmp_path / "base"), tmp_path)
    assert (plan["V2"].policy, plan["V2"].init) == (pocket.sft, tmp_path / "base")
    assert plan["E"].versions["first"] == tmp_path / "V1" / "model"
    assert plan["E"].versions["start"] == pocket.sft
    assert plan["E"].data[0].path == tmp_path / "V1" / "samples" / "best.jsonl"
    assert plan["E"].data[0].kind == "safety"
    assert plan["E"].rewards.safety == pocket.sft / "reward"
    assert plan["E"].rewards.helpfulness == pocket.helpfulness
    assert list(plan) == ["V1", "V2", "E"]  # a comparison of its own needs no other
    steps = [{"name": "V1", "stage": "ppo", "init": "@V2"}, {"name": "V2", "stage": "ppo"}]
    with pytest.raises(InputError, match="steps: V1: 'V2' is no earlier step"):
        planned(recipe(pocket, steps=steps), tmp_path)


def test_tables_are_laid_over_each_other(pocket, tmp_path):
    defaults = {
        "rejection": {
            "samples": 4,
            "train": {"lr": 1e-3, "clip": 0.5},
            "sampling": {"max_tokens": 5},
        }
    }
    steps = [
        {"name": "V1", "stage": "rejection"},
        {"name": "V2", "stage": "rejection", "samples": 6, "train": {"clip": 2.0}},
        {"name": "V3", "stage": "ppo", "rewards": {"threshold": 0.3}},
    ]
    sampling = {"max_tokens": 8, "max_sequences": 3}
    plan = planned(recipe(pocket, steps=steps, defaults=defaults, sampling=sampling), tmp_path)
    first, second, third = (plan[name] for name in ("V1", "V2", "V3"))
    assert (first.samples, first.train.lr, first.train.clip) == (4, 1e-3, 0.5)
    assert (second.samples, second.train.lr, second.train.clip) == (6, 1e-3, 2.0)
    assert (second.sampling.max_tokens, second.sampling.max_sequences) == (5, 3)
    assert (third.sampling.max_tokens, third.sampling.max_sequences) == (8, 3)
    assert (third.rewards.threshold, third.rewards.safety) == (0.3, pocket.safety)
    stage = STAGES["rejection"].recipe.model_fields
    assert first.batch_size == stage["batch_size"].default
    assert first.train.schedule == stage["train"].default.schedule
    assert third.train == STAGES["ppo"].recipe.model_fields["train"].default


def test_what_is_written_down_reads_back(pocket, tmp_path):
    settings = recipe(pocket, defaults=kill_plan.DEFAULTS, base=tmp_path / "base")
    Run.open(tmp_path / "run", settings)
    text = (tmp_path / "run" / "recipe.toml").read_text()
    again = iterate.IterateRecipe.model_validate(tomllib.loads(text))
    assert planned(again, tmp_path) == planned(settings, tmp_path)
    assert again.model_dump(mode="json") == settings.model_dump(mode="json")
    # What a step did not say is not written, since a later default may not be today's.
    assert "safety_coefficient" not in text and "clip" not in text


def test_a_wrong_recipe_is_found_before_anything_runs(pocket, tmp_path):
    steps = [
        {"name": "V1", "stage": "rejection", **REJECTION},
        {"name": "V2", "stage": "reward", "kind": "safety", "init": None, "data": ["x"]},
    ]
    with pytest.raises(InputError, match="steps: V2: "):
        iterate.run(recipe(pocket, steps=steps), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_begun_plan_takes(pocket, tmp_path):
    step = {"name": "V1", "stage": "rejection", **REJECTION}
    second = {"name": "V2", "stage": "ppo"}
    Run.open(tmp_path, recipe(pocket, steps=[step]))

    def resume(*changed, **settings):
        return Run.open(tmp_path, recipe(pocket, steps=list(changed), **settings), resume=True)

    logged = {**step, "train": {**REJECTION["train"], "log_every": 7}}
    resume(logged, second).finish()
    assert resume(logged, second).complete
    assert not resume(logged, second, {"name": "V3", "stage": "dpo"}).complete
    resume(logged, second, {"name": "V3", "stage": "dpo"}).finish()
    quiet = {"rejection": {"train": {"log_every": 3}}}
    assert resume(logged, second, {"name": "V3", "stage": "dpo"}, defaults=quiet).complete
    third = {"name": "V3", "stage": "dpo"}
    for refused, settings in (
        ([{**step, "name": "V9"}, second, third], {}),
        ([{**logged, "samples": 4}, second, third], {}),
        ([logged, second], {}),
        ([], {}),
        ([logged, {**second, "stage": "dpo"}, third], {}),
        ([logged, second, third], {"defaults": {"rejection": {"temperature": 1.2}}}),
        ([logged, second, third], {"seed": 1}),
    ):
        with pytest.raises(InputError, match="asked to resume with"):
            resume(*refused, **settings)


def test_the_papers_plan_is_not_resumed_with_steps(pocket, tmp_path):
    Run.open(tmp_path, recipe(pocket, steps=[]))
    with pytest.raises(InputError, match="asked to resume with"):
        Run.open(tmp_path, recipe(pocket), resume=True)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"name": "sft", "stage": "ppo"}], "'sft' is taken"),
        ([{"name": "SFT", "stage": "ppo"}], "'SFT' is taken"),
        ([{"name": "V1", "stage": "ppo"}, {"name": "v1", "stage": "ppo"}], "'v1' is taken"),
        ([{"name": "a/b", "stage": "ppo"}], "got 'a/b'"),
        ([{"name": "..", "stage": "ppo"}], r"got '\.\.'"),
        ([{"name": "@V1", "stage": "ppo"}], "got '@V1'"),
        ([{"name": "", "stage": "ppo"}], "got ''"),
        ([{"name": "report.json", "stage": "ppo"}], "got 'report.json'"),
        ([{"stage": "ppo"}], r"steps\.0\.name\s+Field required"),
        ([{"name": "V1"}], "None is no stage: expected one of pretrain, "),
        ([{"name": "V1", "stage": "pppo"}], "'pppo' is no stage: expected one of pretrain, "),
        ([{"name": "V1", "stage": "ppo", "clipp": 0.2}], r"steps\.0\.clipp\s+Extra inputs"),
        ([{"name": "V1", "stage": "ppo", "context": 2}], r"steps\.0\.context\s+Extra inputs"),
        ([{"name": "V1", "stage": "ppo", "train": {"lrr": 1}}], r"steps\.0\.train\.lrr\s+Extra"),
        ([{"name": "V1", "stage": "ppo", "iterations": 0}], r"steps\.0\.iterations\s+.*greater"),
    ],
)
def test_impossible_steps_are_refused(pocket, steps, said):
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
    original = evaluate.sample

    def sample(recipe, sampler, run, prompts, n, temperature):
        measured[sampler.policy] = [prompt.id for prompt in prompts]
        return original(recipe, sampler, run, prompts, n, temperature)

    monkeypatch.setattr(evaluate, "sample", sample)
    settings = {"base": tmp_path / "base", "validation": [tmp_path / "held_out.jsonl"]}
    steps = [{"name": "V1", "stage": "rejection", **REJECTION, "samples": 1}]
    iterate.run(recipe(pocket, steps=steps, **settings), tmp_path / "run")
    assert measured == {"SFT": ["may baba visit "], "V1": ["may baba visit "]}


def test_a_plan_without_a_version_compares_the_first_policy(pocket, tmp_path):
    step = {"name": "E", "stage": "evaluate"}
    few = tmp_path / "few.jsonl"
    write(few, problem.prompts(problem.HELD_OUT[:2]))
    settings = recipe(pocket, steps=[step], validation=[few])
    assert iterate.run(settings, tmp_path / "run") == pocket.sft
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["versions"]] == ["SFT"]


@pytest.fixture
def command(pocket, tmp_path, capsys):
    """`command(plan, *options)`: (status, what was said) of `llama2rt iterate` on a file of it."""

    def run(plan: str, *options: str) -> tuple[int, str]:
        path = tmp_path / "plan.toml"
        path.write_text(plan)
        out = ["--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as end:
            cli.main(["iterate", str(path), *options, *out])
        said = capsys.readouterr().err
        return end.value.code, said.replace(str(path), "PLAN.toml")

    return run


def plan_text(pocket, steps: str) -> str:
    settings = recipe(pocket, steps=[]).model_dump(mode="json", exclude_none=True)
    settings.pop("steps")
    settings.pop("defaults")
    return tomli_w.dumps(settings) + "\n" + steps


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("steps = 3", "PLAN.toml: "),  # TOML: below the last table, hence a key of it
        (
            '[[steps]]\nname = "V1"\nstage = "ppo"\nclipp = 1',
            "PLAN.toml: steps.0.clipp: no such key in this recipe",
        ),
        (
            '[[steps]]\nname = "V1"\nstage = "ppo"\n[steps.train]\nlrr = 1',
            "PLAN.toml: steps.0.train.lrr: no such key in this recipe",
        ),
        (
            '[[steps]]\nname = "V1"\nstage = "x"',
            "PLAN.toml: steps.0: 'x' is no stage: expected one of",
        ),
        ('[[steps]]\nstage = "ppo"', "PLAN.toml: steps.0.name: field required"),
        ('[[steps]]\nname = "../a"\nstage = "ppo"', "PLAN.toml: steps.0.name: expected the name"),
        ("[defaults.ppo]\nclipp = 1", "PLAN.toml: defaults.ppo.clipp: no such key"),
        ("[defaults.x]\nclipp = 1", "PLAN.toml: defaults: 'x' is no stage: expected one of"),
        (
            '[[steps]]\nname = "V1"\nstage = "ppo"\ninit = "@V0"',
            "iterate: steps: V1: 'V0' is no earlier step",
        ),
        (
            '[[steps]]\nname = "V1"\nstage = "ppo"\nvalidation = ["none.jsonl"]',
            "iterate: steps: V1: none.jsonl: ",
        ),
        (
            '[defaults.annotate.annotator]\npython = "nowhere_at_all:it"',
            "iterate: steps: comparisons-1: annotator.python: nowhere_at_all:it: ",
        ),
    ],
)
def test_a_wrong_file_is_refused_and_leaves_nothing(pocket, command, tmp_path, steps, said):
    status, message = command(plan_text(pocket, steps))
    assert status == 2 and message.startswith("llama2rt iterate: ") and said in message
    assert "Traceback" not in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_options_change_a_file(pocket, command, monkeypatch):
    """Its steps reach the run as they are; where it names reward models, their keys are options."""
    seen = []
    monkeypatch.setattr(iterate, "run", lambda recipe, *_, **__: seen.append(recipe))
    monkeypatch.setattr(iterate.run, "__annotations__", {"recipe": iterate.IterateRecipe})
    steps = '[[steps]]\nname = "V1"\nstage = "ppo"\niterations = 3\n[defaults.ppo]\nbeta = 0.5'
    options = ("--rewards.threshold", "0.4", "--seed", "5", "--json")
    status, said = command(plan_text(pocket, steps), *options)
    assert status == 1 and "manifest.json" in said  # there is no run to tell of
    (changed,) = seen
    assert (changed.rewards.threshold, changed.rewards.safety) == (0.4, pocket.safety)
    assert changed.seed == 5
    assert changed.steps[0].recipe_keys() == {"iterations": 3}
    assert changed.defaults["ppo"].recipe_keys() == {"beta": 0.5}


def test_a_plan_killed_at_random_moments_comes_to_the_same():
    """Two kills of V1 and V2; tests/helpers/kill_plan.py takes any number, and every stage."""
    script = Path(kill_plan.__file__)
    path = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    options = ["--kills", 2, "--kills-a-run", 2, "--versions", 2, "--course", "paper"]
    done = run_python(script, *options, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert "2 kills: 0 of 40 results differ" in done.stdout


def test_a_wrong_further_step_leaves_a_complete_plan_as_it_was(pocket, tmp_path):
    steps = [{"name": "V1", "stage": "rejection", **REJECTION, "samples": 1}]
    begun = recipe(pocket, steps=steps)
    iterate.run(begun, tmp_path / "run")
    wrong = {"name": "V2", "stage": "rejection", **REJECTION, "earlier": [str(tmp_path / "none")]}
    with pytest.raises(InputError, match=r"steps: V2: earlier: .*none: no run directory"):
        iterate.run(recipe(pocket, steps=[*steps, wrong]), tmp_path / "run", resume=True)
    first = iterate.run(begun, tmp_path / "run", resume=True)
    assert first == tmp_path / "run" / "V1" / "model"
    right = {"name": "V2", "stage": "dpo", **DPO}
    longer = recipe(pocket, steps=[*steps, right])
    second = iterate.run(longer, tmp_path / "run", resume=True)
    assert second == tmp_path / "run" / "V2" / "model"


def test_what_a_key_also_takes_it_takes_in_a_plan():
    keys = table_type("sft").model_validate({"train": {"activation_checkpointing": True}})
    assert keys.given() == {"train": {"activation_checkpointing": "full"}}


def test_the_plan_that_is_killed_holds_every_stage(tmp_path):
    """The plan that tests/helpers/kill_plan.py takes holds them all, and all of it is readable."""
    settings = tomllib.loads(kill_plan.world(tmp_path, 5, "all").read_text())
    plan = resolve(iterate.Plan(iterate.IterateRecipe.model_validate(settings)).steps(), tmp_path)
    assert {step.stage.name for step in plan} == set(STAGES)
    check(plan)


def test_steps_may_train_the_first_policy(pocket, tmp_path):
    """Which is then that of every later step; the manifest says what each step read and left."""
    spoken = tmp_path / "spoken.jsonl"
    answer = {"role": "assistant", "content": "yes"}
    write(spoken, [Dialogue([*p.messages, answer]) for p in problem.prompts(problem.TRAINING[:8])])
    chat = {"name": "chat", "stage": "sft", "init": str(pocket.sft), "data": [str(spoken)]}
    chat |= {"epochs": 1, "train": {"lr": 1e-5}}
    steps = [chat, {"name": "V1", "stage": "rejection", **REJECTION, "samples": 1}]
    given = recipe(pocket, sft="@chat", steps=steps)
    plan = planned(given, tmp_path)
    model = tmp_path / "chat" / "model"
    assert (plan["V1"].policy, plan["V1"].init, plan["V1"].reference) == (model, model, model)
    assert plan["versions at V1"].versions["SFT"] == model
    early = [{"name": "V0", "stage": "dpo", "init": "@sft"}, *steps]
    with pytest.raises(InputError, match="steps: V0: 'chat' is no earlier step"):
        planned(recipe(pocket, sft="@chat", steps=early), tmp_path)
    early[0]["init"] = str(pocket.sft)
    with pytest.raises(InputError, match="V0: reference: sft is 'chat', which a later step trains"):
        planned(recipe(pocket, sft="@chat", steps=early), tmp_path)
    steps[1]["tokenizer"] = "@sft/tok"
    for sft, folder in (("@chat", model), (str(pocket.sft), pocket.sft)):
        assert (
            planned(recipe(pocket, sft=sft, steps=steps), tmp_path)["V1"].tokenizer
            == folder / "tok"
        )
    del steps[1]["tokenizer"]
    with pytest.raises(ValidationError, match="sft: no step is named 'chat'"):
        recipe(pocket, sft="@chat", steps=steps[1:])
    with pytest.raises(ValidationError, match="base: no step is named 'V9'"):
        recipe(pocket, base="@V9")

    root = tmp_path / "run"
    assert iterate.run(given, root) == root / "V1" / "model"
    kept = json.loads((root / "manifest.json").read_text())
    assert set(kept["inputs"]) == {
        "data.0",
        "validation.0",
        "rewards.helpfulness",
        "rewards.safety",
    }
    first, second, _ = kept["steps"]
    assert first["name"] == "chat" and first["read"]["data.0"] == hash_path(spoken)
    hashes = {name: hash_path(root / name / "model") for name in ("chat", "V1")}
    assert second["read"]["policy"] == first["left"]["model"] == hashes["chat"]
    assert second["left"]["model"] == hashes["V1"] != hashes["chat"]
    assert second["left"]["samples"] == hash_path(root / "V1" / "samples")
    assert iterate.run(given, root, resume=True) == root / "V1" / "model"


@pytest.mark.parametrize("stage", iterate.OTHER_DATA)
def test_the_plans_prompts_are_no_data_of_stages_that_read_other_records(pocket, tmp_path, stage):
    """Which would take prompts for dialogues or comparisons: a step names its own, or none."""
    own = {"data": [str(tmp_path / "own.jsonl")]} | ({"steps": 1} if stage == "pretrain" else {})
    found = planned(recipe(pocket, steps=[{"name": "S", "stage": stage, **own}]), tmp_path)["S"]
    assert [getattr(one, "path", one) for one in found.data] == [tmp_path / "own.jsonl"]
    assert not getattr(found, "validation", [])
