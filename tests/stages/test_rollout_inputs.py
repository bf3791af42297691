"""What the RLHF stages check before the first sample: one vocabulary, room for every answer."""

import pocket as problem
import pytest
import torch

from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.generate import engine, scheduler
from llama2rt.generate.budget import forward_bytes
from llama2rt.generate.kv_cache import page_bytes
from llama2rt.model import Llama, LlamaConfig
from llama2rt.rollout.responses import read_responses
from llama2rt.stages import dpo, loading, ppo, rejection


def stages(pocket, settings):
    """(module, recipe) of the three stages that rank samples."""
    common = {
        "rewards.helpfulness": pocket.helpfulness,
        "data": [pocket.prompts],
        "sampling.max_tokens": 8,
    }
    common = problem.tables(common | settings)
    return [
        (ppo, ppo.PpoRecipe(init=pocket.sft, **common)),
        (dpo, dpo.DpoRecipe(init=pocket.sft, **common)),
        (rejection, rejection.RejectionRecipe(policy=pocket.sft, init=pocket.sft, **common)),
    ]


def test_where_frozen_models_wait_may_change_in_a_run(pocket):
    for module, recipe in stages(pocket, {}):
        assert recipe.change("frozen", {"frozen": "offloaded"}) == "neutral"
        evaluated = recipe.change("train.validate_every", {"train.validate_every": 1})
        assert evaluated == ("refused" if module is ppo else "neutral")


@pytest.mark.parametrize("key", ["helpfulness", "safety"])
def test_a_reward_model_of_another_vocabulary_is_refused(pocket, strangers, tmp_path, key):
    for module, recipe in stages(pocket, {f"rewards.{key}": strangers / "reward"}):
        with pytest.raises(InputError, match="reward: its tokenizer is not the policy's"):
            module.run(recipe, tmp_path / module.__name__)


def test_a_reference_or_base_of_another_vocabulary_is_refused(pocket, strangers, tmp_path):
    shared = {"rewards": {"helpfulness": pocket.helpfulness}, "data": [pocket.prompts]}
    recipe = ppo.PpoRecipe(init=pocket.sft, reference=strangers / "policy", **shared)
    with pytest.raises(InputError, match="policy: its tokenizer is not the policy's"):
        ppo.run(recipe, tmp_path / "ppo")
    recipe = rejection.RejectionRecipe(policy=pocket.sft, init=strangers / "policy", **shared)
    with pytest.raises(InputError, match="policy: its tokenizer is not the policy's"):
        rejection.run(recipe, tmp_path / "rejection")
    assert not (tmp_path / "rejection" / "samples").exists()


def test_a_reward_model_without_room_is_refused_before_sampling(pocket, strangers, tmp_path):
    for module, recipe in stages(pocket, {"rewards.helpfulness": strangers / "short"}):
        with pytest.raises(InputError, match="helpfulness: its context of 12 tokens is shorter"):
            module.run(recipe, tmp_path / module.__name__)


def test_layers_cannot_be_cut_over_processes_where_a_stage_samples(pocket, tmp_path):
    for module, recipe in stages(pocket, {"parallel.pipeline": 2}):
        with pytest.raises(
            InputError, match=r"parallel\.pipeline: expected 1, but in pretraining and SFT"
        ):
            module.run(recipe, tmp_path / module.__name__)


def test_prompts_that_fill_the_context_are_left_out_and_counted(pocket, tmp_path, caplog):
    policy, tokenizer = loading.load_llama(pocket.sft)
    short = Prompt("short", [{"role": "user", "content": "may baba visit"}])
    long = Prompt("long", [{"role": "user", "content": "may baba visit " * 40}])
    write(tmp_path / "both.jsonl", [long, short])
    found = loading.read_prompts([tmp_path / "both.jsonl"], tokenizer, policy)
    assert [prompt.id for prompt in found] == ["short"]
    assert "1 prompts that fill the context of 64 left out" in caplog.text
    write(tmp_path / "long.jsonl", [long])
    with pytest.raises(InputError, match=r"long\.jsonl: all 1 prompts fill the policy's context"):
        loading.read_prompts([tmp_path / "long.jsonl"], tokenizer, policy)


def test_prompts_trained_on_and_held_out_are_said(pocket, tmp_path, caplog):
    """PPO keeps the policy that is best on them."""
    names = ("baba", "lulu", "dodo")
    prompts = [Prompt(name, [{"role": "user", "content": f"may {name} visit"}]) for name in names]
    write(tmp_path / "data.jsonl", prompts[:2])
    write(tmp_path / "validation.jsonl", [Prompt("another id", prompts[0].messages), prompts[2]])
    given = {"data": [tmp_path / "data.jsonl"], "validation": [tmp_path / "validation.jsonl"]}
    for module, recipe in stages(pocket, given):
        caplog.clear()
        module.open_inputs(recipe)
        assert "data: 1 prompts are in validation too" in caplog.text


def test_a_tokenizer_beyond_the_embeddings_is_refused(pocket, tmp_path):
    policy, tokenizer = loading.load_llama(pocket.sft)
    smaller = LlamaConfig(**dict(vars(policy.config), vocab_size=tokenizer.vocab_size - 1))
    native.save(Llama(smaller).initialize(0), None, tmp_path / "model")
    with pytest.raises(InputError, match=f"only {tokenizer.vocab_size - 1} embeddings"):
        loading.load_llama(tmp_path / "model", pocket.tokenizer)


@pytest.mark.parametrize("stage", ["dpo", "rejection"])
def test_samples_longer_than_micro_tokens_pass_alone(pocket, tmp_path, stage):
    """Refusing them would come after the sampling, to a run that cannot be resumed otherwise."""
    common = {
        "init": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness},
        "data": [pocket.prompts],
        "sampling": {"max_tokens": 8},
        "samples": 2,
        "train": {"lr": 1e-3, "micro_tokens": 4, "checkpoint_every": 0},
    }
    if stage == "dpo":
        short = {"iterations": 1, "prompts_per_iteration": 16, "temperatures": [1.0]}
        folder = dpo.run(dpo.DpoRecipe(**common, **short), tmp_path / "run")
    else:
        recipe = rejection.RejectionRecipe(policy=pocket.sft, **common)
        folder = rejection.run(recipe, tmp_path / "run")
    model, _ = loading.load_llama(folder)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_max_sequences_and_cache_bytes_bound_what_is_sampled_at_once(pocket, tmp_path, monkeypatch):
    """And changes no sample: what does not fit waits."""
    seen = []

    class Spy(scheduler.Scheduler):
        def __init__(self, budget, *rest, **options):
            seen.append((budget.sequences, budget.pages))
            super().__init__(budget, *rest, **options)

    monkeypatch.setattr(engine, "Scheduler", Spy)
    model, _ = loading.load_llama(pocket.sft)
    page = page_bytes(model, 16)
    few = 10 * page + forward_bytes(
        model.config, model.output.weight.dtype, 100, 1, restricted=False
    )
    texts = []
    for most, size in ((256, None), (3, None), (256, few)):
        short = {"samples": 2, "epochs": 1, "train": {"lr": 1e-3}}
        folder = tmp_path / f"{most}-{size}"
        recipe = rejection.RejectionRecipe(
            policy=pocket.sft,
            init=pocket.sft,
            rewards={"helpfulness": pocket.helpfulness},
            data=[pocket.prompts],
            validation=[pocket.validation],
            sampling={"max_tokens": 8, "max_sequences": most, "cache_bytes": size},
            **short,
        )
        rejection.run(recipe, folder)
        part = folder / "samples" / "part-00000.jsonl"
        texts.append([response.tokens for response in read_responses(part)])
    assert [most for most, _ in seen[2:4]] == [3, 3]
    assert all(0 < pages * page < few for _, pages in seen[4:])
    assert seen[4][0] < seen[0][0] and seen[4][1] < seen[0][1]
    assert texts[0] == texts[1] == texts[2]
