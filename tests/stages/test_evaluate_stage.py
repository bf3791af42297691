"""Versions side by side: one table on the same prompts, answers kept, resumption to the bit."""

import json

import pocket as problem
import pytest

from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.rollout import sampling
from llama2rt.stages import evaluate, loading


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    write(path, problem.prompts(problem.HELD_OUT[:6]))
    return path


def recipe(pocket, few, **settings) -> evaluate.EvaluateRecipe:
    given = {
        "versions": {"SFT": pocket.sft, "The same": pocket.sft},
        "reference": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness, "safety": pocket.safety},
        "data": [few],
        "samples": 2,
        "curves": {"versions": ["SFT"], "prompts": 3, "samples": 4, "temperatures": [0.7, 1.3]},
        "sampling": {"max_tokens": 8},
    }
    return evaluate.EvaluateRecipe.model_validate(given | settings)


@pytest.fixture(scope="module")
def measured(pocket, few, tmp_path_factory):
    return evaluate.run(recipe(pocket, few), tmp_path_factory.mktemp("evaluate") / "run")


def test_versions_meet_the_same_prompts_and_numbers(pocket, few, measured):
    report = json.loads((measured / "report.json").read_text())
    first, second = report["versions"]
    assert (first.pop("name"), second.pop("name")) == ("SFT", "The same")
    assert first == second
    assert (first["kl"]["k1"]["mean"], first["kl"]["k3"]["mean"]) == (0.0, 0.0)
    answers = evaluate.read_answers(measured)
    curves = {"SFT": evaluate.read_curves(recipe(pocket, few), measured / "samples", "SFT")}
    assert set(answers) == {"SFT", "The same"} and set(report["best_of"]) == {"SFT"}
    groups = answers["SFT"]
    assert len(groups) == 12 and {len(group) for group in groups} == {2}
    assert [r.text for g in groups for r in g] == [r.text for g in answers["The same"] for r in g]
    rewards = [response.reward for group in groups for response in group]
    assert first["reward"]["mean"] == pytest.approx(sum(rewards) / len(rewards))
    rates = report["reward_win_rates"]
    assert rates["row_over_column"] == [[None, 0.5], [0.5, None]]
    assert set(curves["SFT"]) == {0.7, 1.3}
    for temperature, some in curves["SFT"].items():
        assert len(some) == 3 and {len(group) for group in some} == {4}
        assert [g[0].prompt.id for g in some] == [g[0].prompt.id for g in groups[:3]]
        assert {r.temperature for group in some for r in group} == {temperature}


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_the_same_bytes_after_a_kill_anywhere(pocket, few, measured, tmp_path, monkeypatch, calls):
    directory = tmp_path / "run"
    problem.killed_and_resumed(
        *(monkeypatch, sampling, "write_responses", calls),
        *(evaluate.run, recipe(pocket, few), directory),
    )
    for path in sorted((measured / "samples").rglob("*.jsonl")):
        again = directory / path.relative_to(measured)
        assert again.read_bytes() == path.read_bytes()
    names = ("versions", "reward_win_rates", "best_of", "length_correlation")
    reports = [json.loads((d / "report.json").read_text()) for d in (measured, directory)]
    assert all(reports[0][name] == reports[1][name] for name in names)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"versions": {}}, "versions: name at least one"),
        ({"curves": {"versions": ["V9"]}}, "curves.versions: 'V9' is none of the versions"),
    ],
)
def test_impossible_comparisons_are_refused(pocket, few, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        evaluate.open_inputs(recipe(pocket, few, **settings))


@pytest.mark.parametrize("names", [("V1", "v1"), ("V 1", "V-1"), ("a/b", "c")])
def test_two_versions_never_share_a_folder(pocket, few, names):
    settings = recipe(pocket, few, versions=dict.fromkeys(names, pocket.sft), curves={})
    with pytest.raises(InputError, match=f"versions: '{names[0]}': expected names without /"):
        evaluate.open_inputs(settings)


def test_all_models_are_checked(pocket, few, strangers):
    for settings, said in (
        ({"versions": {"a": pocket.sft, "b": strangers / "policy"}}, "tokenizer is not the policy"),
        ({"versions": {"a": pocket.helpfulness}}, "expected a language model"),
        ({"rewards": {"helpfulness": strangers / "short"}}, "rewards.helpfulness: its context of"),
        ({"reference": strangers / "policy"}, "tokenizer is not the policy's"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate.open_inputs(recipe(pocket, few, **{"curves": {}, **settings}))


def test_a_version_that_writes_more_than_a_reward_model_reads_is_refused(
    pocket, few, strangers, tmp_path
):
    """Also where another version's context is so short that its answers would fit."""
    short, tokenizer = loading.load_llama(pocket.sft)
    shape = LlamaConfig(**dict(vars(short.config), context=24))
    native.save(Llama(shape).initialize(1), tokenizer, tmp_path / "short")
    reader = LlamaConfig(**dict(vars(short.config), context=30))
    native.save(ScalarModel(reader).initialize(1), tokenizer, tmp_path / "reader")
    settings = {
        "versions": {"short": tmp_path / "short", "long": pocket.sft},
        "reference": pocket.sft,
        "rewards": {"helpfulness": tmp_path / "reader"},
        "sampling": {"max_tokens": 40},
        "curves": {},
    }
    with pytest.raises(InputError, match=r"rewards\.helpfulness: its context of 30 tokens"):
        evaluate.open_inputs(recipe(pocket, few, **settings))
