"""Stages that sample, on several ranks: what they draw, pick, train and log is one process's."""

import functools
import json
import sys

import pocket as problem
import pytest
import tomli_w
import torch
from parallel_rollouts import ppo_parts, refused_plan, run_plan, run_stage, stop_sampling
from processes import run_python
from safetensors.torch import load_file

from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue
from llama2rt.parallel import ParallelOptions
from llama2rt.rollout.responses import read_responses
from llama2rt.stages import (
    context_distillation,
    dpo,
    ghost_attention,
    offline,
    ppo,
    rejection,
)


def dpo_recipe(pocket, **settings):
    given = {
        "iterations": 2,
        "samples": 2,
        "prompts_per_iteration": 6,
        "batch_size": 3,
        "epochs": 1,
        "train": {"lr": 1e-3, "micro_tokens": 40, "checkpoint_every": 0},
    }
    return rollout_recipe(dpo.DpoRecipe, pocket, **(given | settings))


def rollout_recipe(recipe_class, pocket, **settings):
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "sampling.max_tokens": 8,
    }
    return recipe_class(**problem.tables(given | settings))


def rejection_recipe(pocket, **settings):
    """10 prompts, in files of 4."""
    given = {
        "policy": pocket.sft,
        "samples": 3,
        "batch_size": 6,
        "epochs": 2,
        "train": {"lr": 1e-3, "micro_tokens": 40, "checkpoint_every": 2},
    }
    return rollout_recipe(rejection.RejectionRecipe, pocket, **(given | settings))


def ppo_recipe(pocket, **settings):
    given = {
        "iterations": 2,
        # Not the ranks' multiple, nor the mini-batches'.
        "batch_size": 15,
        "mini_batch_size": 6,
        "beta": 0.05,
        "missing_eos_penalty": 1.0,
        "critic_lr": 3e-3,
        "train": {"lr": 1e-3, "micro_tokens": 40, "validate_every": 1, "checkpoint_every": 1},
    }
    return rollout_recipe(ppo.PpoRecipe, pocket, **(given | settings))


@functools.cache
def ppo_alone(pocket, adapted: bool):
    """One process's iteration."""
    return ppo_parts(ppo_recipe(pocket, lora={"rank": 2} if adapted else {}))


@pytest.mark.parametrize(
    ("ranks", "parallel", "lora", "frozen"),
    [
        (2, {}, {}, "resident"),
        (4, {"data": 2}, {}, "resident"),
        (2, {}, {"rank": 2}, "resident"),
        (4, {"tensor": 2}, {}, "sharded"),
    ],
    ids=["sharded", "hybrid", "adapter", "cut"],
)
def test_an_iteration_of_ppo_is_one_processs(on_ranks, pocket, ranks, parallel, lora, frozen):
    if lora:
        pytest.importorskip("peft")
    alone = ppo_alone(pocket, bool(lora))
    recipe = ppo_recipe(pocket, parallel=parallel, lora=lora, frozen=frozen)
    results = on_ranks(ranks, ppo_parts, recipe)
    for result in results:
        # The gathered policy samples what the trained one says, and is still the reference, which
        # in shards is read in other micro-batches.
        kl = [result["measured"][f"kl_{estimator}"] for estimator in ("k1", "k3")]
        assert kl == ([0.0, 0.0] if frozen == "resident" else pytest.approx([0.0, 0.0], abs=1e-5))
        assert result["measured"]["sampler_gap"] < 1e-4
        torch.testing.assert_close(
            result["ratio"], torch.ones_like(result["ratio"]), atol=1e-5, rtol=0
        )
        assert result["tokens"] == alone["tokens"]
        for part in ("measured", "improved"):
            assert result[part] == pytest.approx(alone[part], rel=1e-5, abs=1e-5), part
        assert result["explained"] == pytest.approx(alone["explained"], rel=1e-5)
        for part in ("advantages", "values"):
            torch.testing.assert_close(result[part], alone[part], rtol=1e-5, atol=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-5)


def few(pocket, folder, count=10):
    """Prompts to train on, and held-out ones, not as many as ranks can share evenly."""
    write(folder / "few.jsonl", problem.prompts(problem.TRAINING)[:count])
    write(folder / "held_out.jsonl", problem.prompts(problem.HELD_OUT)[:7])
    return {"data": [folder / "few.jsonl"], "validation": [folder / "held_out.jsonl"]}


def samples(directory):
    """Prompts, tokens and rewards of every file of samples of a run."""
    return {
        str(path.relative_to(directory)): [
            (r.prompt.id, r.tokens, r.policy, r.seed) for r in read_responses(path)
        ]
        for path in response_files(directory)
    }


def rewards(directory):
    return {
        str(path.relative_to(directory)): [r.reward for r in read_responses(path)]
        for path in response_files(directory)
    }


def response_files(directory):
    """All but context distillation's pairs, which hold no tokens."""
    found = sorted((directory / "samples").rglob("*.jsonl"))
    return [path for path in found if path.name != context_distillation.PAIRS]


def assert_same_run(directory, expected, lr):
    """Samples equal; rewards and what is logged to 1e-5; weights to what a step of `lr` rounds."""
    named = {
        name: [(*row[:2], row[3]) for row in rows] for name, rows in samples(directory).items()
    }
    theirs = {
        name: [(*row[:2], row[3]) for row in rows] for name, rows in samples(expected).items()
    }
    assert named == theirs
    assert rewards(directory) == {
        name: pytest.approx(row, abs=1e-4) for name, row in rewards(expected).items()
    }
    logged, alone = problem.metrics(directory), problem.metrics(expected)
    assert len(logged) == len(alone)
    for line, other in zip(logged, alone, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
    weights, others = (load_file(d / "model" / "model.safetensors") for d in (directory, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=lr / 10)


def test_rejection_sampling_stopped_on_two_ranks_goes_on(on_ranks, pocket, tmp_path):
    """It keeps the files it has, picks one process's best samples, and trains the same model."""
    recipe = rejection_recipe(pocket, **few(pocket, tmp_path))
    run_stage("rejection", recipe, tmp_path / "alone")
    directory = tmp_path / "ranks"
    on_ranks(2, stop_sampling, "rejection", recipe, directory, 3)
    parts = sorted((directory / "samples").iterdir())
    assert [path.name for path in parts] == ["part-00000.jsonl", "part-00001.jsonl"]
    before = [path.stat() for path in parts]
    folders = on_ranks(2, run_stage, "rejection", recipe, directory)
    assert folders == [str(directory / "model")] * 2
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [
        (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts
    ]
    assert_same_run(directory, tmp_path / "alone", 1e-3)


def test_context_distillation_stopped_on_two_ranks_goes_on(on_ranks, pocket, tmp_path):
    """Both answers to every prompt, what is kept of them, and the model are one process's."""
    write(tmp_path / "few.jsonl", problem.prompts(problem.TRAINING[:20]))
    given = {
        "data": [{"path": tmp_path / "few.jsonl", "kind": "safety"}],
        "preprompts": {"templates": ["be {adjective}"], "adjectives": ["wise", "kind"]},
        "samples": 2,
        "batch_size": 3,
        "epochs": 2,
        "train": {"lr": 1e-3, "micro_tokens": 40, "checkpoint_every": 2},
    }
    kind = context_distillation.ContextDistillationRecipe
    recipe = rollout_recipe(kind, pocket, **given)
    run_stage("context-distillation", recipe, tmp_path / "alone")
    directory = tmp_path / "ranks"
    on_ranks(2, stop_sampling, "context-distillation", recipe, directory, 3)
    assert len([*(directory / "samples" / "without").iterdir()]) == 2
    folders = on_ranks(2, run_stage, "context-distillation", recipe, directory)
    assert folders == [str(directory / "model")] * 2
    assert_same_run(directory, tmp_path / "alone", 1e-3)


def test_fewer_prompts_than_ranks(on_ranks, pocket, tmp_path):
    recipe = rejection_recipe(pocket, epochs=1, **few(pocket, tmp_path, count=3))
    run_stage("rejection", recipe, tmp_path / "alone")
    on_ranks(4, run_stage, "rejection", recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)


@pytest.mark.parametrize(
    ("stage", "parallel"), [("rejection", {"tensor": 2}), ("dpo", {})], ids=str
)
def test_a_run_whose_frozen_models_are_sharded(on_ranks, pocket, tmp_path, stage, parallel):
    """And whose policy is cut over the tensor ranks while it samples."""
    recipe_of = {"rejection": rejection_recipe, "dpo": dpo_recipe}[stage]
    few_prompts = few(pocket, tmp_path)
    run_stage(stage, recipe_of(pocket, **few_prompts), tmp_path / "alone")
    recipe = recipe_of(pocket, frozen="sharded", parallel=parallel, **few_prompts)
    on_ranks(2, run_stage, stage, recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)


def test_ghost_attention_on_two_ranks(on_ranks, pocket, tmp_path):
    """It asks, keeps, trains on and tests what one process does."""
    said = [[m["content"] for m in problem.messages(kind, "baba")] for kind in problem.QUESTIONS]
    messages = [
        {"role": role, "content": text}
        for (question,), answer in zip(said, ("yes", "sorry"), strict=True)
        for role, text in (("user", question), ("assistant", answer))
    ]
    write(tmp_path / "dialogues.jsonl", [Dialogue(messages)] * 11)
    attributes = tmp_path / "attributes.toml"
    attributes.write_text(
        '[[attributes]]\nname = "answer"\nfull = "say {value}"\nterse = "{value}"\n'
        'values = ["yes", "no"]\ncheck = { contains = ["{value}"] }\n'
    )
    settings = {
        "policy": pocket.sft,
        "init": pocket.sft,
        "data": [tmp_path / "dialogues.jsonl"],
        "held_out": 0.3,
        "attributes": attributes,
        "sampling": {"max_tokens": 8},
        "recall": {"turns": [2]},
        "batch_size": 4,
        "train": {"lr": 1e-3, "micro_tokens": 60, "checkpoint_every": 2},
    }
    recipe = ghost_attention.GhostAttentionRecipe(**settings)
    run_stage("ghost-attention", recipe, tmp_path / "alone")
    cut = recipe.model_copy(update={"parallel": ParallelOptions(tensor=2)})
    for directory, same in ((tmp_path / "ranks", recipe), (tmp_path / "cut", cut)):
        on_ranks(2, run_stage, "ghost-attention", same, directory)
        assert (directory / "dialogues.jsonl").read_bytes() == (
            tmp_path / "alone" / "dialogues.jsonl"
        ).read_bytes()
        reports = [
            json.loads((d / "report.json").read_text()) for d in (tmp_path / "alone", directory)
        ]
        assert reports[0]["recall"] == reports[1]["recall"]
        for name in ("without", "with"):
            one, other = (report["attention"][name] for report in reports)
            assert other["turns"] == pytest.approx(one["turns"], abs=2e-3)
        weights, others = (
            load_file(d / "model" / "model.safetensors") for d in (directory, tmp_path / "alone")
        )
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["infonca", "kto_unpaired", "kto"])
def test_losses_that_read_the_whole_batch(on_ranks, pocket, tmp_path, kind):
    """With offline comparisons and a second agent: the same batches, and of KTO the same KL."""
    recipe = dpo_recipe(
        pocket,
        kind=kind,
        offline=[pocket.helpfulness_comparisons],
        offline_share=0.4,
        **{"second.samples": 1, "second.best_of": 2, "second.iterations_back": 1},
        **few(pocket, tmp_path),
    )
    run_stage("dpo", recipe, tmp_path / "alone")
    on_ranks(2, run_stage, "dpo", recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)


def test_the_offline_stage_on_ranks(on_ranks, pocket, tmp_path):
    train = {"lr": 1e-3, "micro_tokens": 60, "checkpoint_every": 0}
    recipe = offline.OfflineRecipe(
        init=pocket.sft,
        data=[pocket.helpfulness_comparisons],
        held_out=10,
        batch_size=32,
        kind="kto_unpaired",
        train=train,
    )
    run_stage("offline", recipe, tmp_path / "alone")
    on_ranks(2, run_stage, "offline", recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)
    reports = (tmp_path / name / "report.json" for name in ("ranks", "alone"))
    found, alone = (json.loads(path.read_text()) for path in reports)
    assert found["accuracy"] == pytest.approx(alone["accuracy"])


def test_ppo_of_two_iterations(on_ranks, pocket, tmp_path):
    recipe = ppo_recipe(pocket, **few(pocket, tmp_path))
    run_stage("ppo", recipe, tmp_path / "alone")
    on_ranks(2, run_stage, "ppo", recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_ppos_relatives(on_ranks, pocket, tmp_path, algorithm):
    """Whole groups go to a rank, of which one may have none of a mini-batch; each response is used
    twice."""
    changes = {"algorithm": algorithm, "group_size": 3, "epochs": 2, "mini_batch_size": 3}
    # Three more than the multiple of two groups; no critic.
    recipe = ppo_recipe(pocket, **few(pocket, tmp_path), **changes, critic_lr=9e-6, kl_target=0.1)
    run_stage("ppo", recipe, tmp_path / "alone")
    on_ranks(2, run_stage, "ppo", recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["sharded", "cut"])
def test_grpos_only_gradient_step_reads_for_all_ranks(on_ranks, pocket, tmp_path, parallel):
    changes = {"algorithm": "grpo", "group_size": 3, "mini_batch_size": 9, "kl_target": 0.1}
    given = few(pocket, tmp_path) | {"batch_size": 9} | changes
    recipe = ppo_recipe(pocket, **given, critic_lr=9e-6, parallel=parallel)
    assert recipe.reads_while_training
    run_stage("ppo", ppo_recipe(pocket, **given, critic_lr=9e-6), tmp_path / "alone")
    on_ranks(2, run_stage, "ppo", recipe, tmp_path / "ranks")
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", 1e-3)


def plan(pocket, folder, steps, train):
    """What `llama2rt iterate` reads."""
    stages = {step["stage"] for step in steps} - {"annotate"}
    return {
        "sft": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness, "safety": pocket.safety},
        "sampling": {"max_tokens": 6},
        "defaults": {stage: {"train": train} for stage in sorted(stages)},
        "steps": steps,
        **few(pocket, folder),
    }


def test_a_plan_of_every_stage(on_ranks, pocket, tmp_path):
    """Comparisons, a reward model, rejection sampling, PPO, DPO, and all versions compared, also by
    a judge, who is asked once of each answer."""
    train = {"lr": 1e-4, "micro_tokens": 60, "checkpoint_every": 0}
    steps = [
        {"name": "asked", "stage": "annotate", "annotator": {"python": "kill_plan:annotator"}},
        {"name": "helpfulness", "stage": "reward", "kind": "helpfulness", "batch_size": 4},
        {"name": "V1", "stage": "rejection", "samples": 2, "epochs": 1, "batch_size": 4},
        {"name": "V2", "stage": "ppo", "iterations": 1, "batch_size": 6, "mini_batch_size": 3},
        {"name": "V3", "stage": "dpo", "iterations": 1, "samples": 2, "batch_size": 2},
    ]
    settings = plan(pocket, tmp_path, steps, train)
    read, named = tmp_path / "read.txt", tmp_path / "judge.txt"
    named.write_text(str(read))
    judge = {"python": "parallel_rollouts:counting_judge", "files": [named]}
    settings["defaults"]["evaluate"] = {"judge": judge}
    run_plan(settings, tmp_path / "alone" / "run")
    answers = len(read.read_text().splitlines())
    assert answers == 4 * 7
    folders = on_ranks(2, run_plan, settings, tmp_path / "ranks" / "run")
    assert len(read.read_text().splitlines()) == 2 * answers
    assert folders == [str(tmp_path / "ranks" / "run" / "V3" / "model")] * 2
    alone, ranks = tmp_path / "alone" / "run", tmp_path / "ranks" / "run"
    assert (ranks / "asked" / "pairs.jsonl").read_bytes() == (
        alone / "asked" / "pairs.jsonl"
    ).read_bytes()
    reports = [json.loads((run / "report.json").read_text()) for run in (alone, ranks)]
    expected, found = (
        [[row["name"], row["reward"]["mean"], row["kl"]["k1"]["mean"]] for row in r["versions"]]
        for r in reports
    )
    assert [row[0] for row in found] == ["SFT", "V1", "V2", "V3"]
    for row, other in zip(found, expected, strict=True):
        assert row[1:] == pytest.approx(other[1:], rel=1e-3, abs=1e-4)
    for step in ("V1", "V2", "V3"):
        assert samples(ranks / step).keys() == samples(alone / step).keys()


def torchrun(ranks, *arguments):
    """The command under torchrun; what it says on stderr."""
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    command = ("--no-python", "--", sys.executable, "-P", "-m", "llama2rt.cli")
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = run_python(*start, *command, *arguments, env=env, timeout_seconds=200)
    return done.stderr


def test_a_plan_whose_mesh_does_not_fit_the_ranks(on_ranks, pocket, tmp_path):
    steps = [{"name": "V1", "stage": "rejection"}]
    settings = plan(pocket, tmp_path, steps, {"lr": 1e-4}) | {"parallel": {"tensor": 3}}
    for said in on_ranks(2, refused_plan, settings, tmp_path / "run"):
        assert "steps: V1: parallel: tensor 3 needs a multiple of 3 processes" in said
    assert not (tmp_path / "run").exists()


def test_a_plan_by_torchrun(pocket, tmp_path):
    steps = [{"name": "V1", "stage": "rejection", "samples": 2, "epochs": 1, "batch_size": 4}]
    settings = plan(pocket, tmp_path, steps, {"lr": 1e-4, "log_every": 2})
    path = tmp_path / "plan.toml"
    path.write_text(tomli_w.dumps(json.loads(json.dumps(settings, default=str))))
    out = tmp_path / "run"
    said = torchrun(2, "iterate", path, "--out", out)
    assert said.count(f"iterate: done, {out}") == 1 and said.count("sample K answers") == 1
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["versions"]] == ["SFT", "V1"]
    assert json.loads((out / "phases.json").read_text())["seconds"].keys() == {
        "V1",
        "versions at V1",
    }
