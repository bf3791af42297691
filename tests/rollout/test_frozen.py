"""Frozen models that wait in CPU memory: moved once a phase, and what they compute stays the same.

There is no GPU here: its memory is played by copies of the weights, counted as they are made.
"""

import pytest
import torch

from llama2rt.model import Llama, LlamaConfig
from llama2rt.rollout import frozen
from llama2rt.stages import inputs, loading, ppo


@pytest.fixture
def moved(monkeypatch) -> list[int]:
    """Ids of the weights' copies, in order, on a device that has memory of its own."""
    copies = []

    def move(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
        copy = weight.clone()
        copies.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(frozen, "move", move)
    monkeypatch.setattr(frozen, "has_own_memory", lambda device: True)
    return copies


def recipe_of(pocket, where: str) -> ppo.PpoRecipe:
    return ppo.PpoRecipe(
        init=pocket.sft,
        rewards={"helpfulness": pocket.helpfulness, "safety": pocket.safety},
        data=[pocket.prompts],
        iterations=1,
        batch_size=8,
        mini_batch_size=8,
        sampling={"max_tokens": 8},
        frozen=where,
    )


def opened(pocket, where: str):
    recipe = recipe_of(pocket, where)
    inputs = ppo.open_inputs(recipe)
    return recipe, inputs, ppo.load_actors(recipe, inputs)


def weights_of(model) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


def test_each_model_comes_once_a_phase_and_rewards_stay_the_same(pocket, moved):
    resident, _ = ppo.collect(*opened(pocket, "resident"), 0)
    assert moved == []
    recipe, inputs, actors = opened(pocket, "offloaded")
    models = [*inputs.reward_models.by_name.values(), inputs.reference]
    resting = [weights_of(model) for model in models]

    actors.sampler.complete(inputs.prompts[:2], temperature=1.0, seed=0)
    assert moved == []  # nothing of them is needed to sample
    rollout, _ = ppo.collect(recipe, inputs, actors, 0)
    assert len(moved) == sum(len(weights) for weights in resting)
    assert [weights_of(model) for model in models] == resting
    assert torch.equal(rollout.rewards, resident.rewards)
    ppo.improve(recipe, actors, rollout, 0)
    assert len(moved) == sum(len(weights) for weights in resting)


def test_while_one_is_loaded_the_others_wait(pocket, monkeypatch):
    done = []
    load, offload = loading.load_scalar, inputs.offload
    monkeypatch.setattr(loading, "load_scalar", lambda *a: done.append("load") or load(*a))
    monkeypatch.setattr(inputs, "offload", lambda model: done.append("wait") or offload(model))
    assert ppo.open_inputs(recipe_of(pocket, "offloaded")).reward_models.safety is not None
    assert done == ["load", "wait"] * 2


def test_inside_a_phase_the_weights_are_there_and_after_an_error_they_are_not(moved):
    config = LlamaConfig(16, 1, 2, 2, 32, vocab_size=20, context=16)
    model = frozen.offload(Llama(config).initialize(0).requires_grad_(False))
    resting = weights_of(model)

    @frozen.phase
    def inside(model, fails: bool) -> list[int]:
        if fails:
            raise RuntimeError("stopped")
        return weights_of(model)

    assert inside(model, False) == moved != resting
    with pytest.raises(RuntimeError, match="stopped"):
        inside(model, fails=True)
    assert weights_of(model) == resting and len(moved) == 2 * len(resting)


def test_without_a_gpu_nothing_is_moved(pocket, monkeypatch):
    monkeypatch.setattr(frozen, "move", None)
    ppo.collect(*opened(pocket, "offloaded"), 0)
