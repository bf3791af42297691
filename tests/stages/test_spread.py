"""What several processes cannot train as a recipe says is refused by its key, before any data."""

import pocket as problem
import pytest
import torch

from llama2rt.checkpoint import native
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.stages import dpo, loading, ppo, rejection, reward, sft


def stages(pocket, tmp_path, settings):
    """(module, recipe) of the stages that start from a model; their data is not there."""
    data = {"data": [tmp_path / "gone.jsonl"]}
    alone = problem.tables({"init": pocket.sft, **data, **settings})
    sampling = {"rewards.helpfulness": pocket.helpfulness, "sampling.max_tokens": 8}
    ranked = problem.tables({"init": pocket.sft, **sampling, **data, **settings})
    return [
        (sft, sft.SftRecipe(**alone)),
        (reward, reward.RewardRecipe(**alone)),
        (rejection, rejection.RejectionRecipe(policy=pocket.sft, **ranked)),
        (ppo, ppo.PpoRecipe(**ranked)),
        (dpo, dpo.DpoRecipe(**ranked)),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel.tensor": 64}, "parallel.tensor: 64 processes cannot share"),
        ({"parallel.tensor": 2, "lora.rank": 2}, "parallel.tensor: expected 1 with lora.rank"),
        (
            {"parallel.shard": 2, "train.optimizer_device": "cpu"},
            "train.optimizer_device: of a model that is sharded",
        ),
    ],
    ids=["shape", "adapter", "optimizer"],
)
def test_every_stage_refuses_it(pocket, tmp_path, monkeypatch, settings, message):
    if "lora.rank" in settings:
        pytest.importorskip("peft")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, recipe in stages(pocket, tmp_path, settings):
        with pytest.raises(InputError, match=message):
            module.open_inputs(recipe)


def test_the_critic_must_be_cut_too(pocket, tmp_path):
    policy, tokenizer = loading.load_llama(pocket.sft)
    shape = LlamaConfig(**dict(vars(policy.config), heads=1, kv_heads=1))
    native.save(ScalarModel(shape).initialize(1), tokenizer, tmp_path / "critic")
    settings = {"rewards.helpfulness": tmp_path / "critic", "parallel.tensor": 2}
    given = {"init": pocket.sft, "data": [pocket.prompts], **settings}
    with pytest.raises(InputError, match="2 processes cannot share heads 1"):
        ppo.open_inputs(ppo.PpoRecipe(**problem.tables(given)))


def test_what_is_only_read_or_sampled_from_must_be_cut_too(pocket, tmp_path):
    """The policy over tensor ranks, frozen models where they are sharded."""
    policy, tokenizer = loading.load_llama(pocket.sft)
    shape = LlamaConfig(**dict(vars(policy.config), heads=1, kv_heads=1))
    native.save(ScalarModel(shape).initialize(1), tokenizer, tmp_path / "scalar")
    native.save(Llama(shape).initialize(1), tokenizer, tmp_path / "llama")
    given = {
        "init": pocket.sft,
        "policy": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "data": [pocket.prompts],
        "sampling.max_tokens": 4,
        "parallel.tensor": 2,
        "frozen": "sharded",
    }

    def opened(**settings):
        recipe = rejection.RejectionRecipe(**problem.tables(given | settings))
        return rejection.open_inputs(recipe)

    opened()
    scalar = {"rewards.safety": tmp_path / "scalar"}
    opened(**scalar, frozen="resident")
    with pytest.raises(InputError, match=r"rewards\.safety: .* 2 processes cannot share heads 1"):
        opened(**scalar)
    with pytest.raises(InputError, match=r"policy: .* 2 processes cannot share heads 1"):
        opened(policy=tmp_path / "llama", frozen="resident")


def test_layers_are_cut_where_a_stage_can(pocket, tmp_path):
    for module, recipe in stages(pocket, tmp_path, {"parallel.pipeline": 2})[1:]:
        with pytest.raises(InputError, match=r"parallel\.pipeline: expected 1"):
            module.open_inputs(recipe)


def test_online_dpo_finds_out_about_its_processes_before_it_samples(pocket, tmp_path):
    common = {"init": pocket.sft, "data": [pocket.prompts], "parallel.tensor": 2}
    settings = common | {"rewards.helpfulness": pocket.helpfulness, "sampling.max_tokens": 4}
    recipe = dpo.DpoRecipe(**problem.tables(settings), prompts_per_iteration=2, samples=2)
    with pytest.raises(InputError, match="tensor 2 needs a multiple of 2 processes"):
        dpo.run(recipe, tmp_path / "dpo")
    assert not (tmp_path / "dpo" / "iteration-1").exists()
