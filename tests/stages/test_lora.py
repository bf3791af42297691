"""LoRA: few weights are trained, what a stage leaves is the adapted model, and a killed run goes on
to the same bits."""

import json
import shutil
import sys
from types import SimpleNamespace

import pocket as problem
import pytest
import torch
from safetensors.torch import load_file
from small_models import far_from_flat, packed

import llama2rt
from llama2rt.checkpoint import adapter, hf
from llama2rt.data.packing import Example, pack
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.model.adapters import adapt, adapter_off, layers
from llama2rt.model.heads import Normalization
from llama2rt.rollout.logprobs import response_logprobs
from llama2rt.run import Run
from llama2rt.stages import adapters, dpo, loading, ppo, rejection, reward, sft
from llama2rt.train.lora import LoraOptions
from llama2rt.train.metrics import training_flops
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions

pytest.importorskip("peft", reason="peft (the extra lora) is not installed")

LORA = {"rank": 1, "targets": ["value", "attention_output", "down"]}
OTHER = {"helpfulness": "safety", "safety": "helpfulness"}
TRAIN = {"lr": 3e-2, "schedule": "constant", "checkpoint_every": 2, "log_every": 2}


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Dialogues in which each kind of question gets the other kind's answers."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    lines = [
        {"messages": [*problem.messages(kind, name), {"role": "assistant", "content": answer}]}
        for kind, other in OTHER.items()
        for name in problem.TRAINING[::2]
        for answer in problem.ANSWERS[other]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft_recipe(pocket, talks, lora=LORA, **train) -> sft.SftRecipe:
    settings = {"init": pocket.sft, "data": [talks], "batch_size": 20, "epochs": 5}
    return sft.SftRecipe(**settings, held_out=0.1, lora=lora, train=TRAIN | train)


@pytest.fixture(scope="module")
def trained(pocket, talks, tmp_path_factory):
    """The directory of a fine-tuning that nobody stopped."""
    return sft.run(sft_recipe(pocket, talks), tmp_path_factory.mktemp("trained") / "run").parent


def adapted(pocket, directory, lora, dtype=torch.float32) -> Llama:
    """The model under the adapter that a run has left."""
    model, _ = llama2rt.load(pocket.sft, dtype=dtype)
    LoraOptions(**lora).adapt(model, seed=99)
    adapter.load(model, directory / "adapter")
    return model


def batch(vocabulary: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return packed(*(torch.randint(vocabulary, (n,), generator=draw) for n in (9, 23)))


def trained_share(model) -> float:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / model.config.parameters


def test_sft_trains_two_percent_and_leaves_the_adapted_model(pocket, talks, tmp_path):
    folder = sft.run(sft_recipe(pocket, talks, checkpoint_every=20), tmp_path / "run")
    lines = problem.metrics(tmp_path / "run")
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert held_out[-1] < 0.3 * held_out[0]

    under = adapted(pocket, tmp_path / "run", LORA)
    assert trained_share(under) <= 0.02
    merged, _ = llama2rt.load(folder)
    begun, _ = llama2rt.load(pocket.sft)
    tokens = batch(merged.config.vocab_size)
    with torch.no_grad():
        logits = under.logits(*tokens)
        assert float((merged.logits(*tokens) - logits).abs().max()) < 1e-5
        assert float((begun.logits(*tokens) - logits).abs().max()) > 0.1
        with adapter_off(under):
            assert torch.equal(begun.logits(*tokens), under.logits(*tokens))
        assert torch.equal(logits, under.logits(*tokens))

    # What a run keeps to go on is the adapter's alone: masters, moments and step counts.
    (shard,) = (tmp_path / "run" / "checkpoints" / "step-20").glob("*.safetensors")
    kept = {name for name in load_file(shard) if not name.startswith("generator.")}
    assert len(kept) == 4 * 12 and all(".lora_" in name for name in kept)


@pytest.mark.parametrize("preset", ["llama2-7b", "llama3-8b"])
def test_rank_16_on_every_layer_is_two_percent_of_a_whole_model(preset):
    model = Llama(LlamaConfig.preset(preset, layers=1), "meta")
    adapt(model, rank=16, alpha=32.0)
    layers_of_preset = LlamaConfig.preset(preset).layers
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * layers_of_preset
    assert trained <= 0.02 * LlamaConfig.preset(preset).parameters


def test_peft_puts_the_adapter_on_the_hugging_face_export(pocket, talks, tmp_path):
    import peft
    import transformers

    lora = {"rank": 2}
    sft.run(sft_recipe(pocket, talks, lora, lr=5e-3), tmp_path / "run")
    hf.save(*llama2rt.load(pocket.sft), tmp_path / "export")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "export")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "run" / "adapter").eval()
    ours, _ = llama2rt.load(tmp_path / "run" / "model")
    tokens = torch.randint(
        ours.config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        assert float((ours.logits(*packed(tokens)) - expected).abs().max()) < 1e-5
        whole = theirs.merge_and_unload()(tokens[None]).logits[0]
        assert float((ours.logits(*packed(tokens)) - whole).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "lora, train",
    [(LORA, {}), (LORA | {"dropout": 0.2}, {"activation_checkpointing": True})],
    ids=["plain", "dropout"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    pocket, talks, trained, tmp_path, monkeypatch, lora, train
):
    recipe = sft_recipe(pocket, talks, lora, **train)
    whole = trained if lora == LORA else sft.run(recipe, tmp_path / "whole").parent
    # The 4th line is step 4's, written before checkpoint 4: steps 3 and 4 are taken again.
    killed = tmp_path / "killed"
    resumed = problem.killed_and_resumed(monkeypatch, Run, "log", 4, sft.run, recipe, killed)
    assert problem.weights(whole / "model") == problem.weights(resumed)
    assert problem.metrics(whole) == problem.metrics(killed)
    left = [(directory / "adapter").iterdir() for directory in (whole, killed)]
    first, second = ({path.name: path.read_bytes() for path in paths} for paths in left)
    assert first == second and len(first) >= 2


def test_recomputed_dropout_gives_the_gradients_of_a_kept_one():
    from llama2rt.train.recompute import recompute_blocks

    def gradients(recomputed: bool) -> list:
        model = far_from_flat()
        adapt(model, rank=2, alpha=4.0, dropout=0.5)
        with torch.no_grad():
            for layer in layers(model).values():
                layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
        model.train()
        torch.manual_seed(5)
        tokens = batch(400)
        if recomputed:
            with recompute_blocks(model):
                model(*tokens, tokens[0]).sum().backward()
        else:
            model(*tokens, tokens[0]).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    kept = gradients(False)
    assert len(kept) == 28
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(True), strict=True))


def test_in_bf16_the_whole_model_keeps_the_bits_of_the_weights_it_was_not_rounded_to(
    pocket, talks, tmp_path
):
    recipe = sft_recipe(pocket, talks, precision="bf16", lr=1e-6)
    merged, _ = llama2rt.load(sft.run(recipe, tmp_path / "run"))
    begun, _ = llama2rt.load(pocket.sft)
    moved = {
        name: float((p - merged.get_parameter(name)).detach().abs().max())
        for name, p in begun.named_parameters()
    }
    targets = {
        n: m for n, m in moved.items() if n.endswith(tuple(f"{t}.weight" for t in LORA["targets"]))
    }
    assert len(targets) == 6 and all(0 < value < 5e-5 for value in targets.values())
    assert all(moved[name] == 0 for name in moved.keys() - targets.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_engine_samples_with_the_adapter(pocket, trained, dtype):
    """Decoding takes few rows at a time, for which `ops.linear` has a product of its own."""
    begun, tokenizer = llama2rt.load(pocket.sft, dtype=dtype)
    under = adapted(pocket, trained, LORA, dtype).to(dtype)
    prompts = [problem.messages("safety", name) for name in ("baba", "kilu")]
    texts = {}
    for name, model in (("begun", begun), ("under", under)):
        samples = Engine(model, tokenizer).generate(prompts, n=16, max_tokens=8, seed=1)
        texts[name] = [sample.text for sample in samples]
        # The sampler's log-probabilities are those of the path that training takes.
        for sample in samples[:4]:
            ids = [*sample.prompt_tokens, *sample.tokens]
            with torch.no_grad():
                targets = torch.tensor([*ids[1:], -1])
                logprob = model(*packed(ids), targets)[-len(sample.tokens) - 1 : -1]
            gap = (logprob - torch.tensor(sample.logprobs)).abs().max()
            assert float(gap) < (1e-4 if dtype == torch.float32 else 0.1)
    taught = problem.ANSWERS["helpfulness"]
    share = {name: sum(text in taught for text in texts[name]) / 32 for name in texts}
    assert share["under"] > 0.75 and share["begun"] < 0.1


def test_frozen_weights_take_no_product_for_their_gradient():
    model = far_from_flat()
    documents = [Example.of(range(1, n)) for n in (10, 24)]
    layout, config = pack(documents), model.config
    assert (len(layout.tokens), layout.weight) == (32, 30)
    whole = training_flops(model, layout)
    adapt(model, rank=2, alpha=4.0)
    blocks = config.parameters - 2 * 400 * 64 - (2 * config.layers + 1) * config.dim
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = training_flops(model, layout)
    assert whole - frozen == 2 * (32 * blocks + 30 * 400 * 64) - 6 * 32 * adapters


def test_the_optimizer_holds_the_adapter_alone_in_fp32():
    model = ScalarModel(LlamaConfig(64, 2, 4, 2, 128, vocab_size=50), dtype=torch.bfloat16)
    adapt(model.initialize(0), rank=2, alpha=4.0)
    optimizer = Optimizer(model, TrainOptions(precision="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(".lora_" in name or name == "head.weight" for name in optimizer.names)
    assert len(optimizer.names) == 2 * 7 * 2 + 1
    assert {master.dtype for master in optimizer.master.values()} == {torch.float32}


def test_the_seed_decides_the_adapter_and_no_generator_moves():
    first, second, other = (far_from_flat() for _ in range(3))
    state = torch.get_rng_state()
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        adapt(model, rank=2, alpha=4.0, seed=seed)
    a, b, c = (m.transformer.blocks[1].up.lora_A["default"].weight for m in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_without_peft_the_extra_is_named_before_anything_is_written(pocket, talks, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"lora: needs peft.*pip install 'llama2rt\[lora\]'"):
        sft.open_inputs(sft_recipe(pocket, talks))
    sft.open_inputs(sft_recipe(pocket, talks, {}))


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"alpha": 8}, "rank: missing"),
        ({"dropout": 0.1}, "rank: missing"),
        ({"rank": 0}, "greater than 0"),
        ({"rank": 4, "targets": []}, "at least 1"),
        ({"rank": 4, "targets": ["output"]}, "query"),
        ({"rank": 4, "targets": ["up", "up"]}, "expected different layers"),
    ],
)
def test_a_table_that_says_nothing_is_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        LoraOptions(**lora)


def test_a_damaged_adapter_is_named(pocket, trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match=r"adapter_model.safetensors: base_model.*q_proj.*lora_A"):
        adapted(pocket, tmp_path / "run", {"rank": 4})
    with pytest.raises(InputError, match=r"down_proj.*: not part of this adapter"):
        adapted(pocket, tmp_path / "run", {"rank": 1, "targets": ["value"]})
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="damaged or not safetensors"):
        adapted(pocket, tmp_path / "run", LORA)


def stage_recipe(stage: str, pocket, lora=LORA, **settings):
    """A short run of a stage that samples, or of the reward stage."""
    if stage == "reward":
        train = {"lr": 1e-2, "log_every": 5, "checkpoint_every": 5}
        return problem.reward_recipe(pocket, "safety", lora=lora, train=train)
    given = {
        "init": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness, "safety": pocket.safety},
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling": {"max_tokens": 8},
        "lora": lora,
    }
    if stage == "ppo":
        train = {"lr": 3e-3, "validate_every": 2, "checkpoint_every": 2}
        sizes = {"iterations": 4, "batch_size": 16, "mini_batch_size": 8, "critic_lr": 3e-3}
        return ppo.PpoRecipe(**(given | sizes | {"train": train} | settings))
    train = {"lr": 3e-3, "checkpoint_every": 2, "warmup_ratio": 0.0}
    if stage == "rejection":
        sizes = {"policy": pocket.sft, "samples": 2, "epochs": 1, "batch_size": 50}
        return rejection.RejectionRecipe(**(given | sizes | {"train": train} | settings))
    sizes = {"iterations": 2, "prompts_per_iteration": 30, "samples": 4, "temperatures": [1.0]}
    sizes |= {"batch_size": 8, "epochs": 2}
    return dpo.DpoRecipe(**(given | sizes | {"train": train} | settings))


@pytest.mark.parametrize(
    "stage, precision, calls",
    [("reward", "fp32", 3), ("rejection", "fp32", 1), ("dpo", "bf16", 7), ("ppo", "fp32", 4)],
)
def test_every_stage_leaves_what_an_uninterrupted_run_leaves(
    pocket, tmp_path, monkeypatch, stage, precision, calls
):
    run = {"reward": reward, "rejection": rejection, "dpo": dpo, "ppo": ppo}[stage].run
    recipe = stage_recipe(stage, pocket)
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"precision": precision})}
    )
    whole = run(recipe, tmp_path / "whole")
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "log", calls, run, recipe, tmp_path / "killed"
    )
    assert problem.weights(whole) == problem.weights(resumed)
    assert problem.metrics(tmp_path / "whole") == problem.metrics(tmp_path / "killed")

    # The merged model is the base under the adapter that lies beside it.
    merged, _ = llama2rt.load(whole)
    under, _ = llama2rt.load(pocket.sft)
    if stage == "reward":
        under = ScalarModel.from_llama(under)
    adapt(under, rank=1, alpha=2.0, targets=LORA["targets"])
    adapter.load(under, tmp_path / "whole" / "adapter")
    tokens = batch(merged.config.vocab_size)
    with torch.no_grad():
        a, b = (m(*tokens) if stage == "reward" else m.logits(*tokens) for m in (merged, under))
        assert float((a - b).abs().max()) < 1e-5
        with adapter_off(under):
            plain = under(*tokens) if stage == "reward" else under.logits(*tokens)
    assert float((plain - b).abs().max()) > 1e-4


@pytest.mark.parametrize("given", [None, "init", "other"])
def test_the_reference_is_the_policy_without_its_adapter(pocket, tmp_path, given):
    """PPO's two models of one shape, in bytes of weights that lie in memory."""
    other = tmp_path / "other"
    shutil.copytree(pocket.sft, other)
    reference = {None: None, "init": pocket.sft, "other": other}[given]
    recipe = stage_recipe("ppo", pocket, reference=reference)
    inputs = ppo.open_inputs(recipe)
    actors = ppo.load_actors(recipe, inputs)
    weights = {
        p.data_ptr(): p.nbytes
        for model in (actors.policy, inputs.reference)
        for p in model.parameters()
    }
    models = sum(weights.values()) / (4 * actors.policy.config.parameters)
    assert models == pytest.approx(2.0 if given == "other" else 1.0, abs=0.02)

    # A step on, the reference is still the model in the folder, to the bit.
    rollout, _ = ppo.collect(recipe, inputs, actors, 0)
    ppo.improve(recipe, actors, rollout, 0)
    whole, _ = llama2rt.load(pocket.sft)
    with torch.no_grad():
        scored = [
            response_logprobs(model, rollout.examples, 1.0, 4096)[0]
            for model in (whole, inputs.reference, actors.policy)
        ]
    assert torch.equal(scored[0], scored[1]) and not torch.equal(scored[0], scored[2])


def test_dpo_holds_one_model(pocket, tmp_path, monkeypatch):
    """Without an adapter an iteration loads the policy to sample, the reference, the policy to
    train; with one nothing but the base, once, and once more at each export, on the CPU."""
    loaded = []

    def counted(folder, *arguments):
        loaded.append(folder)
        return load(folder, *arguments)

    load = loading.load
    for module in (loading, adapters):
        monkeypatch.setattr(module, "load", counted)
    dpo.run(stage_recipe("dpo", pocket), tmp_path / "run")
    weights = [folder for folder in loaded if folder == pocket.sft]
    outlined = 1
    assert len(weights) == outlined + 1 + 3  # two iterations and the run itself
    assert not any(tmp_path in folder.parents for folder in loaded)


def test_peft_puts_a_reward_adapter_and_its_head_on_the_export(pocket, tmp_path):
    import peft
    import transformers

    reward.run(stage_recipe("reward", pocket), tmp_path / "run")
    begun, tokenizer = llama2rt.load(pocket.sft)
    hf.save(ScalarModel.from_llama(begun, seed=7), tokenizer, tmp_path / "export")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "run" / "adapter").eval()
    ours, _ = llama2rt.load(tmp_path / "run" / "model")
    tokens = torch.arange(3, 40)
    with torch.no_grad():
        score = float(theirs(tokens[None]).logits)
        assert float(ours(*packed(tokens))[-1]) == pytest.approx(score, abs=1e-5)


def test_an_adapted_reward_model_keeps_its_normalization(pocket, tmp_path):
    begun, tokenizer = llama2rt.load(pocket.sft)
    model = ScalarModel.from_llama(begun, seed=7)
    LoraOptions(**LORA).adapt(model, 0)
    model.normalization = Normalization(mean=2.0, std=3.0)
    run = SimpleNamespace(model_directory=tmp_path / "m", adapter_directory=tmp_path / "adapter")
    adapters.save(model, tokenizer, run, pocket.sft)
    assert llama2rt.load(tmp_path / "m")[0].normalization == model.normalization


def test_ppo_refuses_dropout_and_a_reward_model_of_no_model_an_adapter(pocket):
    with pytest.raises(ValueError, match=r"lora.dropout\n.*less than or equal to 0"):
        stage_recipe("ppo", pocket, LORA | {"dropout": 0.1})
    with pytest.raises(ValueError, match=r"lora: .*give init"):
        reward.RewardRecipe(
            data=[pocket.safety_comparisons],
            model={"dim": 32, "layers": 1, "heads": 2},
            tokenizer=pocket.tokenizer,
            lora=LORA,
        )
