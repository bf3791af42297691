"""A plan: order, recipes from earlier outputs, what is wrong found before the first step."""

import json

import pytest

from llama2rt.errors import InputError
from llama2rt.pipeline import run as pipeline_run
from llama2rt.pipeline.plan import Outputs, Step, check, resolve
from llama2rt.pipeline.run import Clock
from llama2rt.rollout.reward import RewardOptions
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.stages import STAGES
from llama2rt.stages.annotate import AnnotateRecipe
from llama2rt.stages.evaluate import EvaluateRecipe
from llama2rt.stages.ppo import PpoRecipe
from llama2rt.stages.rejection import RejectionRecipe
from llama2rt.stages.reward import RewardRecipe

SAMPLING = SamplingOptions(max_tokens=8)


@pytest.fixture
def rewards(pocket):
    return RewardOptions(helpfulness=pocket.helpfulness, safety=pocket.safety)


@pytest.fixture
def rejection(pocket, rewards):
    """`rejection(name, before=None, **keys)`: a step that samples from the step `before`."""

    def step(name: str, before: str | None = None, **keys) -> Step:
        def recipe(outputs: Outputs) -> RejectionRecipe:
            given = {
                "policy": outputs.model(before) if before else pocket.sft,
                "init": pocket.sft,
                "rewards": rewards,
                "data": [pocket.prompts],
                "sampling": SAMPLING,
            }
            return RejectionRecipe(**(given | keys))

        return Step(name, "rejection", recipe)

    return step


def test_a_recipe_is_a_function_of_what_was_before(rejection, tmp_path):
    steps = [rejection("a"), rejection("b", "a"), rejection("c", "b")]
    plan = resolve(steps, tmp_path)
    assert [step.directory for step in plan] == [tmp_path / name for name in "abc"]
    assert plan[1].recipe.policy == tmp_path / "a" / "model"
    assert plan[2].recipe.policy == tmp_path / "b" / "model"
    assert {step.purpose for step in plan} == {STAGES["rejection"].help}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", ["b", "c", "nowhere"])
def test_only_what_was_before_is_there(rejection, tmp_path, before):
    steps = [rejection("a"), rejection("b", before), rejection("c")]
    with pytest.raises(InputError, match=rf"steps: b: '{before}' is no earlier step .*before: a\)"):
        resolve(steps, tmp_path)


def test_two_steps_of_one_name_are_refused(rejection, tmp_path):
    with pytest.raises(InputError, match="steps: two are named 'a'"):
        resolve([rejection("a"), rejection("a")], tmp_path)


def wrong_last_steps(pocket, strangers, rewards):
    """Recipes of a last step that cannot be, and what is said of each."""
    bad = strangers / "bad.jsonl"
    bad.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n{"id": 3}\n')
    common = {"rewards": rewards, "data": [pocket.prompts], "sampling": SAMPLING}
    foreign = rewards.model_copy(update={"safety": strangers / "reward"})
    short = rewards.model_copy(update={"safety": strangers / "short"})
    return {
        "validation": (
            "ppo",
            lambda o: PpoRecipe(init=o.model("a"), validation=[bad], **common),
            r"bad.jsonl:2: ",
        ),
        "missing": (
            "ppo",
            lambda o: PpoRecipe(init=o.model("a"), validation=[strangers / "none"], **common),
            "none: cannot be read",
        ),
        "tokenizer": (
            "ppo",
            lambda o: PpoRecipe(init=o.model("a"), **{**common, "rewards": foreign}),
            "reward: its tokenizer is not the policy's",
        ),
        "context": (
            "ppo",
            lambda o: PpoRecipe(init=o.model("a"), **{**common, "rewards": short}),
            "rewards.safety: its context of 12 tokens is shorter",
        ),
        "kind": (
            "ppo",
            lambda o: PpoRecipe(
                init=o.model("a"), **{**common, "rewards": RewardOptions(helpfulness=pocket.sft)}
            ),
            "expected a reward model, found a language model",
        ),
        "comparisons": (
            "reward",
            lambda o: RewardRecipe(init=o.model("a"), data=[o.directory("a") / "none.jsonl"]),
            "none.jsonl: no such file, and no earlier step leaves it",
        ),
        "annotator": (
            "annotate",
            lambda o: AnnotateRecipe(
                policy=o.model("a"),
                data=[pocket.prompts],
                annotator={"helpfulness": o.model("a")},
                sampling=SAMPLING,
            ),
            None,
        ),
        "versions": (
            "evaluate",
            lambda o: EvaluateRecipe(
                versions={"V1": o.model("a"), "v1": pocket.sft}, reference=pocket.sft, **common
            ),
            "versions: 'V1': expected names",
        ),
    }


WRONG = ["validation", "missing", "tokenizer", "context", "kind", "comparisons", "versions"]


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_last_step_is_found_before_the_first(
    pocket, strangers, rewards, rejection, tmp_path, monkeypatch, which
):
    stage, recipe, said = wrong_last_steps(pocket, strangers, rewards)[which]
    steps = [rejection("a"), Step("last", stage, recipe)]
    seen = []
    monkeypatch.setattr("llama2rt.checkpoint.native.load_file", seen.append, raising=False)
    with pytest.raises(InputError, match=rf"^steps: last: .*{said}"):
        pipeline_run.run(pipeline_run.prepare(steps, tmp_path), Clock(tmp_path / "phases.json"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_checked_loads_no_weights(pocket, rejection, tmp_path, monkeypatch):
    from llama2rt.stages import loading

    devices = []
    original = loading.load

    def load(folder, device="cpu", *rest):
        devices.append(device)
        return original(folder, device, *rest)

    monkeypatch.setattr(loading, "load", load)
    check(resolve([rejection("a"), rejection("b", "a")], tmp_path))
    assert set(devices) == {"meta"}


def test_a_step_that_is_done_is_read_and_one_to_come_is_not(pocket, rejection, tmp_path):
    """b pools a's samples: before a has run, its room is reckoned; after, its file is read."""
    steps = [
        rejection("a", samples=1, epochs=1),
        rejection("b", "a", earlier=[tmp_path / "a"], samples=1, epochs=1),
    ]
    plan = resolve(steps, tmp_path)
    check(plan)
    plan[0].stage.run(plan[0].recipe, plan[0].directory)
    check(plan)
    (tmp_path / "a" / "samples" / "best.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"^steps: b: .*best.jsonl:1"):
        check(plan)


def test_steps_run_in_order_and_the_clock_adds_up(rejection, tmp_path, monkeypatch):
    ran = []

    def run(recipe, directory, *, resume):
        ran.append((directory.name, resume))
        if directory.name == "b" and len(ran) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(STAGES["rejection"].module, "run", run)
    steps = [rejection("a"), rejection("b", "a"), rejection("c", "b")]
    path = tmp_path / "phases.json"
    with pytest.raises(KeyboardInterrupt):
        pipeline_run.run(pipeline_run.prepare(steps, tmp_path), Clock(path))
    before = json.loads(path.read_text())["seconds"]
    assert set(before) == {"a", "b"}
    plan = pipeline_run.prepare(steps, tmp_path)
    pipeline_run.run(plan, Clock(path))
    assert ran == [(name, True) for name in "ab" + "abc"]
    after = json.loads(path.read_text())["seconds"]
    assert set(after) == {"a", "b", "c"} and after["b"] > before["b"]
    assert [step.name for step in plan] == ["a", "b", "c"]


def test_a_step_that_fails_is_named(rejection, tmp_path, monkeypatch):
    def run(recipe, directory, *, resume):
        raise InputError("no response to train on")

    monkeypatch.setattr(STAGES["rejection"].module, "run", run)
    plan = pipeline_run.prepare([rejection("a")], tmp_path)
    with pytest.raises(InputError, match=r"^steps: a: no response to train on"):
        pipeline_run.run(plan, Clock(tmp_path / "phases.json"))
