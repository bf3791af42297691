"""Stages whose answers come from a server, `llama2rt serve` here: what they learn and measure is as
if they had sampled themselves, and what a server cannot do is refused before anything is loaded."""

import dataclasses
import json

import pocket as problem
import pytest
from served import KEY, served

from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.parallel import world
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.stages import annotate, dpo, loading, ppo, rejection


@pytest.fixture(scope="module")
def server(pocket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    model, tokenizer = loading.load_llama(pocket.sft)
    engine = Engine(model, tokenizer, cache_bytes=2**26)
    with served(engine, weights_from=folder) as found:
        yield found, folder


@pytest.fixture(autouse=True)
def _key(monkeypatch) -> None:
    monkeypatch.setenv("LLAMA2RT_API_KEY", KEY)


def settings(pocket, server, **more) -> dict:
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "sampling.max_tokens": 8,
        "sampling.server": server[0].url,
        "sampling.tolerance": 1e-4,
        "train": {"lr": 1e-3, "checkpoint_every": 0},
    }
    return problem.tables(given | more)


def handed_over(server) -> dict:
    reload = f"{server[0].url}/update_weights_from_disk"
    return {"sampling.weights": str(server[1] / "policy"), "sampling.reload": reload}


def test_rejection_sampling_takes_a_servers_answers(pocket, server, tmp_path) -> None:
    more = {"policy": pocket.sft, "samples": 2, "epochs": 1}
    rejection.run(rejection.RejectionRecipe(**settings(pocket, server, **more)), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["prompts"] == 100 and report["targets"] > 50


def test_ppo_hands_its_policy_over_before_each_rollout(pocket, server, tmp_path) -> None:
    more = {
        "iterations": 3,
        "batch_size": 16,
        "mini_batch_size": 8,
        "critic_lr": 3e-3,
        **handed_over(server),
    }
    ppo.run(ppo.PpoRecipe(**settings(pocket, server, **more)), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    gaps = [row["sampler_gap"] for row in map(json.loads, lines) if "sampler_gap" in row]
    # The policy has moved; what it is said to have sampled is still what it would say.
    assert len(gaps) == 3 and max(gaps) < 1e-3
    served, (trained, _) = server[0].engine.model, loading.load_llama(tmp_path / "run" / "model")
    assert not served.output.weight.equal(trained.output.weight)  # the last step is not sampled


def test_what_a_server_cannot_promise_is_refused(pocket, server, monkeypatch) -> None:
    def refused(module, recipe_class, words: str, **more) -> None:
        recipe = recipe_class(**settings(pocket, server, **more))
        with pytest.raises(InputError, match=words):
            module.open_inputs(recipe)

    trained = "sampling.server: the model that is trained .* sampling.weights"
    lora, given = {"lora": {"rank": 2}}, handed_over(server)
    with_policy = {"policy": pocket.sft}
    validated = {"validation": [pocket.validation]}
    refused(ppo, ppo.PpoRecipe, trained)
    refused(ppo, ppo.PpoRecipe, r"adapter .* \[lora\]", **lora, **given)
    refused(dpo, dpo.DpoRecipe, trained, iterations=2)
    refused(dpo, dpo.DpoRecipe, trained, iterations=1, **validated)
    refused(rejection, rejection.RejectionRecipe, trained, **with_policy, **validated)
    dpo.open_inputs(dpo.DpoRecipe(**settings(pocket, server, iterations=1)))
    asked = {
        "policy": pocket.sft,
        "other": pocket.sft,
        "data": [pocket.prompts],
        "annotator": {"python": "a:b"},
        "sampling": {"server": server[0].url},
    }
    with pytest.raises(InputError, match=r"sampling\.server: other answers"):
        annotate.open_inputs(annotate.AnnotateRecipe(**asked))
    two = dataclasses.replace(world(), size=2)
    monkeypatch.setattr("llama2rt.rollout.sampling.world", lambda: two)
    refused(dpo, dpo.DpoRecipe, "2 processes", iterations=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"server": "http://a", "weights": "w"}, "weights and reload"),
        ({"server": "http://a", "reload": "true"}, "weights and reload"),
        ({"weights": "w", "reload": "true"}, "weights: only with server"),
        ({"server_model": "m"}, "server_model: only with server"),
        ({"server": "http://a", "tolerance": 0}, "tolerance"),
    ],
)
def test_keys_that_go_together(given, words) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingOptions(**given)
