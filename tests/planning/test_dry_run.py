"""`--dry-run`: what it says against what a run does, what it refuses, what it leaves alone."""

import json
from dataclasses import replace

import pytest
import tomli_w

from llama2rt import cli
from llama2rt.data import tokens
from llama2rt.data.records import Document
from llama2rt.data.tokens import TokenFile
from llama2rt.model import LlamaConfig
from llama2rt.parallel import ParallelOptions
from llama2rt.planning import Model, Options, Phase, Sampling, Work, dry_run
from llama2rt.stages import STAGES, loading
from llama2rt.stages.loading import Outline
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.options import TrainOptions

PRETRAIN = {
    "held_out": 0.1,
    "vocab_size": 310,
    "context": 32,
    "batch_tokens": 256,
    "epochs": 2,
    "model": {"dim": 32, "layers": 1, "heads": 2},
    "train": {"lr": 1e-2, "micro_tokens": 256},
}


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    import llama2rt.train.allocator

    monkeypatch.setattr(llama2rt.train.allocator, "keep_freed_memory", lambda: True)


def call(*arguments) -> int:
    """Exit status of the command, run inside this process."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def said(capsys, *arguments) -> dict:
    assert call(*arguments, "--dry-run", "--json") == 0
    return json.loads(capsys.readouterr().out)


def write(path, **recipe):
    path.write_text(tomli_w.dumps(recipe))
    return path


def rollout(pocket, **more):
    return {
        "init": str(pocket.sft),
        "rewards": {"helpfulness": str(pocket.helpfulness), "safety": str(pocket.safety)},
        "data": [str(pocket.prompts)],
        "sampling": {"max_tokens": 8},
        **more,
    }


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} says {i * i} and no more than {i}\n" for i in range(200)))
    return write(tmp_path / "pretrain.toml", data=[str(path)], **PRETRAIN)


def test_pretraining_takes_the_steps_and_tokens_that_were_said(text, tmp_path, capsys):
    plan = said(capsys, "pretrain", text)
    assert plan["steps"]["how"] == "exact"
    assert not (tmp_path / "OUT").exists()
    assert call("pretrain", text, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == plan["steps"]["value"]
    stream = TokenFile(tmp_path / "run" / "tokens" / "training.bin")
    assert plan["notes"][0] == f"the training text is {len(stream):,} tokens (exact)"
    with_out = said(capsys, "pretrain", text, "--out", tmp_path / "other")
    assert with_out == plan and not (tmp_path / "other").exists()


def test_a_large_text_is_estimated_and_said_so(tmp_path, monkeypatch):
    documents = [Document(f"entry {i}: " + "some words of text " * (i % 7 + 1)) for i in range(900)]
    tokenizer = Tokenizer.train((d.text for d in documents), 320, tmp_path / "tokenizer.model")
    exact = tokens.estimate(documents, tokenizer)
    stream = tokens.build(documents, tokenizer, tmp_path / "stream.bin")
    assert exact.value == len(stream) and exact.how == "exact"
    monkeypatch.setattr(tokens, "SAMPLED_BYTES", 5000)
    sampled = tokens.estimate(documents, tokenizer)
    assert sampled.how.startswith("estimate from ") and sampled.value != len(stream)
    assert sampled.value == pytest.approx(len(stream), rel=0.05)
    one = [Document(" ".join(d.text for d in documents))]
    alone = exact.value - 2 * (len(documents) - 1)  # BOS and EOS but once
    assert tokens.estimate(one, tokenizer).value == pytest.approx(alone, rel=0.05)


def test_every_stage_says_what_it_holds(pocket, tmp_path, capsys, monkeypatch):
    """On real folders, of which no weight is loaded."""
    devices = []
    load = loading.load
    monkeypatch.setattr(
        loading, "load", lambda folder, device, *a: devices.append(device) or load(folder, device)
    )
    own = load(pocket.sft, "meta")[0]
    policy = sum(p.numel() for p in own.parameters())
    scalar = sum(p.numel() for p in load(pocket.helpfulness, "meta")[0].parameters())
    recipes = {
        "ppo": rollout(pocket, iterations=3, batch_size=16, mini_batch_size=8),
        "dpo": rollout(pocket, iterations=2, samples=2, batch_size=16, epochs=1),
        "rejection": rollout(pocket, policy=str(pocket.sft), samples=3, batch_size=16, epochs=1),
        "offline": {
            "init": str(pocket.sft),
            "data": [str(pocket.helpfulness_comparisons)],
            "held_out": 10,
            "batch_size": 16,
        },
        "reward": {
            "init": str(pocket.sft),
            "data": [str(pocket.helpfulness_comparisons)],
            "held_out": 10,
            "batch_size": 16,
        },
        "annotate": {
            "policy": str(pocket.sft),
            "data": [str(pocket.prompts)],
            "annotator": {"files": [str(tmp_path / "said.jsonl")]},
            "sampling": {"max_tokens": 8},
        },
    }
    plans = {
        stage: said(capsys, stage, write(tmp_path / f"{stage}.toml", **recipe))
        for stage, recipe in recipes.items()
    }
    counts = {
        "ppo": (2 * policy + 3 * scalar, policy + scalar),
        "dpo": (2 * policy + 2 * scalar, policy),
        "rejection": (2 * policy + 2 * scalar, policy),
        "offline": (2 * policy, policy),
        "reward": (scalar, scalar),
        "annotate": (policy, 0),
    }
    for stage, (total, trainable) in counts.items():
        found = plans[stage]["parameters"]
        assert (found["total"], found["trainable"]) == (total, trainable), stage
        assert plans[stage]["fits"] and plans[stage]["peak_bytes"] > 0
        assert plans[stage]["gpu_hours"]["value"] > 0
    assert plans["ppo"]["steps"]["value"] == 3 * 2
    prompts = len(pocket.prompts.read_text().splitlines())
    assert plans["rejection"]["steps"]["value"] == -(-prompts // 16)
    assert plans["dpo"]["steps"]["value"] == -(-prompts // 16) + -(-2 * prompts // 16)
    assert set(plans["ppo"]["memory_bytes"]) == {"rollout", "training"}
    held_out = write(
        tmp_path / "held_out.toml", **recipes["rejection"], validation=[str(pocket.validation)]
    )
    measuring = said(capsys, "rejection", held_out)["memory_bytes"]["measuring"]
    assert measuring["frozen"] == 4 * (policy + 2 * scalar)  # the reference too
    assert plans["ppo"]["memory_bytes"]["rollout"]["kv_cache"] > 0
    server = {"server": "http://127.0.0.1:1/v1", "weights": str(tmp_path), "reload": "true"}
    recipes["ppo"]["sampling"] |= server
    served = said(capsys, "ppo", write(tmp_path / "served.toml", **recipes["ppo"]))
    assert "kv_cache" not in served["memory_bytes"]["rollout"]
    assert served["step_seconds"] and not served["sampling_seconds"] and not served["gpu_hours"]
    assert devices and set(devices) == {"meta"}
    assert not list(tmp_path.glob("OUT*"))


def test_under_adapters_ppo_holds_three_models_less(pocket, tmp_path, capsys):
    """No reference, and neither policy nor critic a second time in masters and moments."""
    sizes = {
        "iterations": 3,
        "batch_size": 16,
        "mini_batch_size": 8,
        "train": {"precision": "bf16"},
    }
    plans = {}
    for name, lora in (("whole", {}), ("adapted", {"rank": 1, "targets": ["value"]})):
        recipe = write(tmp_path / f"{name}.toml", **rollout(pocket, lora=lora, **sizes))
        plans[name] = said(capsys, "ppo", recipe)
    config = loading.load(pocket.sft, "meta")[0].config
    adapter = config.layers * 2 * config.dim
    found = plans["adapted"]["parameters"]
    assert found["trainable"] == 2 * adapter + config.dim  # the critic's head too
    assert plans["whole"]["parameters"]["total"] - found["total"] == config.parameters
    whole, adapted = (plan["memory_bytes"]["training"] for plan in plans.values())
    assert whole["frozen"] - adapted["frozen"] == 2 * config.parameters
    assert adapted["masters"] == pytest.approx(4 * found["trainable"])
    assert adapted["moments"] == pytest.approx(8 * found["trainable"])
    assert adapted["gradients"] < 0.05 * whole["gradients"]
    # Among several the reference is a second model, and frozen ones are whole.
    found = said(capsys, "ppo", tmp_path / "adapted.toml", "--parallel.shard", 2)
    assert found["parameters"]["total"] == plans["whole"]["parameters"]["total"]
    assert found["memory_bytes"]["training"]["frozen"] == whole["frozen"]


def test_sft_takes_the_steps_that_were_said(pocket, tmp_path, capsys):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"may ba visit {i}"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(21)
    ]
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write(
        tmp_path / "sft.toml",
        init=str(pocket.sft),
        data=[str(data)],
        held_out=0.0,
        batch_size=8,
        epochs=2,
    )
    plan = said(capsys, "sft", recipe)
    assert call("sft", recipe, "--out", tmp_path / "run") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["step"] == plan["steps"]["value"] == 2 * 3
    assert plan["epochs"] == 2


def test_a_plan_lists_its_steps(pocket, tmp_path, capsys):
    iterate = {
        "sft": str(pocket.sft),
        "rewards": {"helpfulness": str(pocket.helpfulness), "safety": str(pocket.safety)},
        "data": [str(pocket.prompts)],
        "validation": [str(pocket.validation)],
        "sampling": {"max_tokens": 8},
        "versions": 2,
    }
    path = write(tmp_path / "iterate.toml", **iterate)
    plan = said(capsys, "iterate", path)
    names = ["RLHF-V1", "RLHF-V2-rejection", "RLHF-V2", "versions at RLHF-V2"]
    assert [step["stage"] for step in plan["steps"]] == names
    assert all(step["ranks"] == 4 for step in said(capsys, "iterate", path, "--ranks", 4)["steps"])
    assert call("iterate", path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(f"{name}: dry run on 1 x" in out for name in names)
    assert "iterate: 4 steps, " in out
    write(path, **iterate | {"data": [str(tmp_path / "gone.jsonl")]})
    assert call("iterate", path, "--dry-run") == 2
    assert "steps: RLHF-V1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", 3, "--parallel.tensor", 2), "parallel: tensor 2 needs a multiple of 2"),
        (("--ranks", 3, "--parallel.tensor", 3), "parallel.tensor: 3 processes cannot share heads"),
        (("--parallel.pipeline", 2), "parallel.pipeline: 2 stages of a model with 1 layers"),
        (("--ranks", 0), "ranks: expected at least 1, got 0"),
        (("--gpu", "a1000"), "gpu: expected one of a100-40gb"),
        (("--fabric", "token-ring"), "fabric: expected one of"),
        (("--assume", "llama9"), "assume: expected one of llama1-7b"),
        (("--data", "gone.txt"), "gone.txt: no such file"),
    ],
)
def test_what_does_not_fit_is_status_two(text, capsys, options, message):
    assert call("pretrain", text, "--dry-run", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("reward", {"parallel": {"pipeline": 2}}, "parallel.pipeline: expected 1, but in"),
        ("sft", {"parallel": {"tensor": 2}, "lora": {"rank": 2}}, "parallel.tensor: expected 1"),
        (
            "sft",
            {"parallel": {"shard": 2}, "train": {"optimizer_device": "cpu"}},
            "train.optimizer_device: of a model that is sharded",
        ),
    ],
)
def test_what_a_mesh_cannot_train_does_not_fit(tmp_path, capsys, verb, settings, message):
    recipe = write(tmp_path / "r.toml", init="gone", data=["gone.jsonl"], **settings)
    assert call(verb, recipe, "--dry-run", "--assume", "llama2-7b") == 2
    assert message in capsys.readouterr().err


def test_the_run_directory_is_still_asked_for(text, capsys):
    assert call("pretrain", text) == 2
    assert "--out" in capsys.readouterr().err


def test_a_stage_without_a_plan_says_what_it_will_leave(monkeypatch):
    stage = STAGES["sft"]
    monkeypatch.delattr(stage.module, "plan")
    config = LlamaConfig(dim=32, layers=1, heads=2, kv_heads=2, ffn_hidden=64, vocab_size=64)

    class Opened:
        result = Outline(config, None)

    plan = dry_run("sft", stage.plan(None, Opened, None), Options())
    assert plan.parameters == config.parameters and plan.trainable == 0
    assert plan.as_json()["steps"] is None
    assert dry_run("x", Work([]), Options()).as_json()["peak_bytes"] == 0


def test_frozen_models_are_whole_on_every_rank_or_come_one_by_one_or_are_shared():
    """7B, bf16, on 8 ranks, by hand: 2 bytes a frozen weight, 12 / 8 of a trained one; two tensor
    ranks share the policy that samples."""
    config, own, scalar = LlamaConfig.preset("llama2-7b"), 6_738_415_616, 6_607_347_712
    policy = Model("policy", config)

    def planned(where: str, cache_bytes: int) -> dict:
        frozen = [
            Model("helpfulness", config, scalar=True, held=where),
            Model("reference", config, held=where),
        ]
        drawn = Sampling(replace(policy, lent=True), 64, 256, 1024, 2048, 1024, cache_bytes)
        phases = [
            Phase("rollout", [policy], frozen, drawn),
            Phase("training", [policy], frozen, training=True),
        ]
        parallel = ParallelOptions(shard=4, tensor=2)
        work = Work(phases, TrainOptions(precision="bf16"), parallel)
        return dry_run("x", work, Options()).as_json()

    stay, wait, share = (planned(where, 2**30) for where in ("resident", "offloaded", "sharded"))
    states = {"masters": 4 * own / 8, "moments": 8 * own / 8}
    for phase in ("rollout", "training"):
        assert stay["memory_bytes"][phase]["frozen"] == 2 * (own + scalar)
        for name, value in states.items():
            # Norms are not cut by tensor parallelism.
            assert wait["memory_bytes"][phase][name] == pytest.approx(value, rel=1e-3)
    assert "frozen" not in wait["memory_bytes"]["training"]
    reading = wait["memory_bytes"]["rollout"]
    assert reading["frozen"] == 2 * own and "kv_cache" not in reading
    assert reading["gathered"] == pytest.approx(own, rel=1e-3)
    # Keys and values for 256 sequences take more than the largest of those that wait.
    sampling = planned("offloaded", 30 * 2**30)["memory_bytes"]["rollout"]
    assert "frozen" not in sampling
    assert sampling["gathered"] == pytest.approx(own, rel=1e-3)
    assert sampling["kv_cache"] + sampling["activations"] == pytest.approx(30 * 2**30)
    assert wait["notes"][0] == "offloaded models: 24.9 GiB of the CPU's memory a rank, pinned"
    # In shards all are there at all times, and as one reads, two blocks and what is around them.
    for phase in ("rollout", "training"):
        held = share["memory_bytes"][phase]["frozen"]
        assert held == pytest.approx(2 * (own + scalar) / 8, rel=1e-3)
    block = 4 * config.dim**2 + 3 * config.dim * config.ffn_hidden
    read = 2 * (2 * block + 2 * config.vocab_size * config.dim) / 2
    assert share["memory_bytes"]["rollout"]["gathered"] == pytest.approx(own + read, rel=1e-3)


def test_torchrun_says_how_many_ranks_there_are(text, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert said(capsys, "pretrain", text)["mesh"]["shard"] == 4
    assert said(capsys, "pretrain", text, "--ranks", 2)["ranks"] == 2


def test_degrees_of_what_trains_nothing():
    """Every rank has it whole."""
    config = LlamaConfig.preset("llama2-7b")
    work = Work([Phase("loaded", frozen=[Model("m", config)])])
    one, eight = (dry_run("x", work, Options(ranks)) for ranks in (1, 8))
    assert one.peak_bytes == eight.peak_bytes == 4 * config.parameters
