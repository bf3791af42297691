"""A study of policies: variants from several seeds in one table, by a judge that is asked once."""

import json

import pocket as problem
import pytest
from pydantic import ValidationError

from llama2rt import cli
from llama2rt.data.readers import write
from llama2rt.errors import InputError
from llama2rt.pipeline import dry_run, iterate, policies, study
from llama2rt.pipeline.plan import resolve
from llama2rt.planning import Options
from llama2rt.stages import STAGES


@pytest.fixture
def asked(tmp_path):
    """The file that names the judge's log, and the log: a line for each answer it reads."""
    named, log = tmp_path / "judge.txt", tmp_path / "asked.txt"
    named.write_text(str(log))
    write(tmp_path / "held_out.jsonl", problem.prompts(problem.HELD_OUT[:5]))
    write(tmp_path / "said.jsonl", problem.comparisons("helpfulness", problem.TRAINING[:8], 0))
    return named, log


def recipe(pocket, named, **settings) -> study.StudyRecipe:
    rewards = {"helpfulness": pocket.helpfulness, "safety": pocket.safety}
    small = {"lr": 1e-3, "checkpoint_every": 0}
    given = {
        "seeds": [0, 1],
        "defaults": {
            "dpo": {
                "init": pocket.sft,
                "data": [pocket.prompts],
                "rewards": rewards,
                "iterations": 1,
                "prompts_per_iteration": 8,
                "samples": 2,
                "sampling": {"max_tokens": 6},
                "batch_size": 4,
                "epochs": 1,
                "train": small,
            },
            "evaluate": {
                "reference": pocket.sft,
                "versions": {"SFT": pocket.sft},
                "data": [named.with_name("held_out.jsonl")],
                "rewards": rewards,
                "sampling": {"max_tokens": 6},
                "judge": {"python": "parallel_rollouts:counting_judge", "files": [named]},
            },
        },
        "policies": [
            {"name": "online", "stage": "dpo"},
            {
                "name": "offline",
                "stage": "offline",
                "init": pocket.sft,
                "data": [named.with_name("said.jsonl")],
                "held_out": 0,
                "batch_size": 16,
                "train": small,
            },
        ],
    }
    return study.StudyRecipe.model_validate(given | settings)


def test_variants_in_one_table(pocket, asked, tmp_path, monkeypatch):
    named, log = asked
    settings = recipe(pocket, named)
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        # Killed when all is measured, before it is written.
        patch.setattr(policies.report, "finish", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            study.run(settings, directory)
    study.run(settings, directory, resume=True)
    # SFT, and two policies from two seeds each.
    assert len(log.read_text().splitlines()) == 5 * 10
    found = json.loads((directory / "report.json").read_text())
    rows = {row["name"]: row for row in found["policies"]}
    assert list(rows) == ["SFT", "online", "offline"]
    assert rows["SFT"]["kl"] == 0.0 != rows["online"]["kl"]
    for name, row in rows.items():
        assert len(row["score"]["by_seed"]) == (1 if name == "SFT" else 2)
        assert row["worth"]["mean"] == pytest.approx(row["characters"]["mean"])
        assert row["score"]["low"] <= row["score"]["mean"] <= row["score"]["high"]
    assert rows["online"]["score"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert rows["online"]["win_rate"]["mean"] == 0.5
    text = (directory / "tables.md").read_text()
    assert "win rate against online" in text and "| offline |" in text
    assert "Policies" in (directory / "report.html").read_text()

    # One policy more: only it is trained.
    begun = (directory / "online-seed-0" / "manifest.json").stat().st_mtime_ns
    longer = recipe(
        pocket,
        named,
        policies=[
            *(policy.given() for policy in settings.policies),
            {"name": "infonca", "stage": "dpo", "kind": "infonca", "length_penalty": 0.5},
        ],
    )
    study.run(longer, directory, resume=True)
    assert (directory / "online-seed-0" / "manifest.json").stat().st_mtime_ns == begun
    found = json.loads((directory / "report.json").read_text())
    assert [row["name"] for row in found["policies"]][-1] == "infonca"


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ({"stage": "reward", "name": "x"}, "policies: x: reward leaves no policy"),
        ({"stage": "dpo", "name": "x", "seed": 1}, "policies: x: seed: seeds of the study"),
        ({"stage": "dpo", "name": "x", "kind": "exo"}, "policies: x: .*label_smoothing"),
    ],
)
def test_policies_that_cannot_be_are_refused(pocket, asked, policy, named):
    with pytest.raises(InputError, match=named):
        study.steps(recipe(pocket, asked[0], policies=[policy]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_limits": [5]}, "data_limits: says nothing of policies"),
        ({"tests": {"x": ["nowhere.jsonl"]}}, "tests: says nothing of policies"),
        ({"like": "nowhere"}, "like: says nothing of policies"),
    ],
)
def test_keys_of_reward_models_are_refused_beside_policies(pocket, asked, changes, said):
    with pytest.raises(ValidationError, match=said):
        recipe(pocket, asked[0], **changes)


def test_what_policies_are_compared_by_is_asked_for(pocket, asked):
    given = recipe(pocket, asked[0])
    without = {stage: keys for stage, keys in given.defaults.items() if stage != "evaluate"}
    with pytest.raises(InputError, match="missing data, reference, rewards"):
        study.steps(given.model_copy(update={"defaults": without}))


def test_models_and_policies_are_studies_of_their_own(pocket, asked):
    with pytest.raises(ValueError, match="a study of each"):
        recipe(pocket, asked[0], models=[{"name": "x"}])


def test_shipped_plans_and_studies_are_valid(tmp_path):
    def read(name):
        return cli.read_recipe(cli.find_recipe(name))

    table = study.StudyRecipe.model_validate(read("study-online-dpo"))
    plan = {step.name: step.recipe for step in resolve(study.steps(table), tmp_path)}
    assert len(plan) == 4 * 3 + 1
    penalties = [plan[f"{name}-seed-2"].length_penalty for name in ("online DPO", "length penalty")]
    assert penalties[0] == 0 < penalties[1]
    first = plan["first reward models-seed-0"].rewards
    assert "-1" in str(first.helpfulness) and "-1" in str(first.safety)
    assert list(plan["answers-of-13"].versions)[:2] == ["SFT", "online DPO, seed 0"]
    for name, stage in (("online-ppo", "ppo"), ("online-rejection", "rejection")):
        recipe = iterate.IterateRecipe.model_validate(read(name))
        found = resolve(iterate.Plan(recipe).steps(), tmp_path)
        steps = [step.recipe for step in found if step.stage.name == stage]
        before = [tmp_path / "iteration-1" / "model", tmp_path / "iteration-2" / "model"]
        assert [step.init for step in steps] == [recipe.sft, *before]
        assert {step.reference for step in steps} == {recipe.sft}
    assert [len(step.earlier) for step in steps] == [0, 1, 2]
    offline = STAGES["offline"].recipe.model_validate(read("offline-dpo"))
    assert (offline.epochs, offline.batch_size, offline.train.lr) == (1, 128, 5e-7)
    plan = dry_run.stage("offline", offline, Options(gpu="a100-80gb"), "llama3-8b")
    assert plan.ranks == 8 and plan.fits
