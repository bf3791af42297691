"""PPO's relatives without a critic, and its options: what they do to rollouts and runs."""

import dataclasses
import json

import numpy as np
import pocket as problem
import pytest
import torch
from ppo_runs import correct_share, logged, opened, perturb
from pydantic import ValidationError

from llama2rt.algorithms import advantages
from llama2rt.errors import InputError
from llama2rt.rollout import logprobs
from llama2rt.run import Run
from llama2rt.stages import experience, loading, ppo
from llama2rt.stages.ppo_recipe import PpoRecipe

WITHOUT_CRITIC = ("grpo", "rloo", "reinforce++")
GROUPS = {"grpo": 4, "rloo": 4, "reinforce++": 1}


def recipe(pocket, **settings) -> PpoRecipe:
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "batch_size": 16,
        "mini_batch_size": 8,
        "sampling.max_tokens": 8,
        "beta": 0.05,
        "train": {"lr": 1e-3},
    }
    return PpoRecipe(**problem.tables(given | settings))


@pytest.mark.parametrize("algorithm", ["ppo", *WITHOUT_CRITIC])
def test_the_first_mini_batch_is_the_rollouts_policy(pocket, algorithm):
    """Ratio 1, nothing clipped, KL 0, by each algorithm; then the policy moves, and no other."""
    settings = recipe(
        pocket, algorithm=algorithm, group_size=GROUPS.get(algorithm, 1), mini_batch_size=16
    )
    inputs = opened(settings)
    actors = ppo.load_actors(settings, inputs)
    assert (actors.critic is None) == (algorithm != "ppo") == (len(actors.optimizers) == 1)
    before = [p.clone() for p in actors.policy.parameters()]
    rollout, numbers = ppo.collect(settings, inputs, actors, 0)
    assert rollout.read == ("kl_k1" in numbers) == (algorithm != "grpo")
    assert ("value_explained_variance" in numbers) == (algorithm == "ppo")
    improved = ppo.improve(settings, actors, rollout, 0)
    read = numbers | improved
    if algorithm == "grpo":  # training packs what it reads otherwise than the reference did
        assert read["kl_k1"] == pytest.approx(0, abs=1e-5) and read["kl_k3"] < 1e-8
    else:
        assert read["kl_k1"] == read["kl_k3"] == 0.0
    assert improved["clip_fraction"] == 0.0
    assert improved["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert improved["update_kl"] == pytest.approx(0.0, abs=1e-8)
    assert not any(map(torch.equal, before, actors.policy.parameters()))
    # A second pass over the same rollout is not by its policy any more.
    assert ppo.improve(settings, actors, rollout, 0)["update_kl"] > 1e-6


def test_a_gradient_step_that_reads_what_was_sampled(pocket, monkeypatch):
    """GRPO's only step of a rollout leaves what a step after a reading of its own does, and says
    the same; what needs the reading first has it."""
    found = []
    for once in (True, False):
        settings = recipe(
            pocket, algorithm="grpo", group_size=4, mini_batch_size=16, train={"micro_tokens": 64}
        )
        assert settings.reads_while_training
        inputs = opened(settings, 6)
        actors = ppo.load_actors(settings, inputs)
        perturb(actors.policy)
        with monkeypatch.context() as patch:
            patch.setattr(PpoRecipe, "reads_while_training", once)
            rollout, numbers = ppo.collect(settings, inputs, actors, 0)
            assert rollout.read != once and ("entropy" in numbers) != once
            numbers |= ppo.improve(settings, actors, rollout, 0)
        assert rollout.read and numbers["kl_k1"] != 0
        assert numbers["clip_fraction"] == 0 and (numbers["ratio"] == 1 or not once)
        found.append((rollout, numbers, [p.detach().clone() for p in actors.policy.parameters()]))
    (one, numbers, weights), (two, expected, others) = found
    assert numbers.keys() == expected.keys() and numbers["sampler_gap"] < 1e-5
    assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name in ("logprob", "entropy", "sampled", "advantages"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-6)
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "once"),
    [
        ({}, True),
        ({"mini_batch_size": 64}, True),  # of which a rollout is a part
        ({"kl_target": 0.1, "kl_horizon": 64}, True),
        ({"mini_batch_size": 8}, False),
        ({"epochs": 2}, False),
        ({"max_kl": 1.0}, False),
        ({"exact_kl": True}, False),
        *(({"algorithm": algorithm}, False) for algorithm in ("ppo", "rloo", "reinforce++")),
    ],
)
def test_who_reads_what_was_sampled_once(pocket, changes, once):
    """And a dry run counts what reads it before training."""
    given = {"algorithm": "grpo", "group_size": 4, "mini_batch_size": 16} | changes
    settings = recipe(pocket, **given)
    assert settings.reads_while_training == once
    config = loading.load_llama(pocket.sft, device="meta")[0].config
    readers = ppo.plan(settings, None, lambda _: config).phases[0].sampling.readers
    assert ("policy" in {model.name for model in readers}) != once


def test_groups_answer_one_prompt_and_share_its_computation(pocket, monkeypatch):
    """Log-probabilities and a gradient step are those of each response by itself."""
    settings = recipe(pocket, algorithm="grpo", group_size=4)
    inputs = opened(settings, 6)
    steps = []
    for shared in (True, False):
        actors = ppo.load_actors(settings, inputs)
        perturb(actors.policy)
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(ppo, "pack_shared", ppo.pack)
            rollout, _ = ppo.collect(settings, inputs, actors, 0)
            ppo.improve(settings, actors, rollout, 0)
        steps.append([p.detach().clone() for p in actors.policy.parameters()])
    prompts = [tuple(e.tokens[~e.trainable].tolist()) for e in rollout.examples]
    assert all(len({*prompts[i : i + 4]}) == 1 for i in range(0, 16, 4)) and len({*prompts}) == 4
    alone, _ = logprobs.response_logprobs(inputs.reference, rollout.examples, 1.0, 8)
    torch.testing.assert_close(rollout.reference, alone, rtol=1e-4, atol=1e-5)
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_micro_batches_keep_groups_whole_where_they_fit(pocket):
    members, lengths = np.array([4, 5, 6, 7, 0, 1, 2, 3]), np.full(8, 10)
    batch = ppo.MiniBatch(members, 80)
    for most, sizes in ((40, [4, 4]), (70, [4, 4]), (80, [8]), (39, [3, 3, 2])):
        settings = recipe(pocket, algorithm="grpo", group_size=4, train={"micro_tokens": most})
        parts = batch.micro_batches(settings, lengths, (0, 1))
        assert [len(part) for part in parts] == sizes
        assert np.concatenate(parts).tolist() == members.tolist()
    two = [batch.micro_batches(settings, lengths, (rank, 2)) for rank in range(2)]
    assert len(two[0]) == len(two[1])
    assert sorted(np.concatenate([*two[0], *two[1]]).tolist()) == list(range(8))


def test_a_verifiable_reward_rises_without_a_critic(pocket, tmp_path):
    """By each of two, and together by more than 5 standard errors."""
    gained = []
    for algorithm in ("grpo", "rloo"):
        settings = recipe(
            pocket,
            algorithm=algorithm,
            group_size=4,
            validation=[pocket.validation],
            iterations=10,
            batch_size=64,
            mini_batch_size=16,
            missing_eos_penalty=1.0,
            train={"lr": 2e-3, "validate_every": 0},
        )
        ppo.run(settings, tmp_path / algorithm)
        samples = tmp_path / algorithm / "samples"
        before, after = (correct_share(samples / f"{n:05d}.jsonl") for n in (0, 10))
        gained.append(after - before)
        assert gained[-1] > 0.1, algorithm
    assert np.mean(gained) > 5 * np.sqrt(2 * 0.25 / 200)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "algorithm": "grpo",
            "group_size": 4,
            "epochs": 2,
            "kl_target": 0.1,
            "kl_horizon": 64,
            "reward_normalization": "running",
        },
        {"epochs": 2, "reward_normalization": "running", "kl_target": 0.1, "kl_horizon": 64},
    ],
    ids=["grpo", "ppo"],
)
def test_resumed_equals_uninterrupted(pocket, tmp_path, monkeypatch, changes):
    """With beta adapted, running statistics and several epochs."""
    train = {"lr": 1e-3, "validate_every": 0, "checkpoint_every": 2}
    settings = recipe(pocket, iterations=5, train=train, **changes)
    whole = ppo.run(settings, tmp_path / "whole")
    lines = [line for line in logged(tmp_path / "whole") if "beta" in line]
    assert len({line["beta"] for line in lines}) == 5
    warm_up = changes.get("algorithm", "ppo") == "ppo"
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "log", 4 + warm_up, ppo.run, settings, tmp_path / "killed"
    )
    assert problem.weights(whole) == problem.weights(resumed)
    assert problem.metrics(tmp_path / "whole") == problem.metrics(tmp_path / "killed")


def test_epochs_use_a_rollout_again_until_it_is_left_too_far(pocket):
    taken = {}
    for most in (None, 1e3, 1e-9):
        settings = recipe(pocket, algorithm="rloo", group_size=4, epochs=3, max_epoch_kl=most)
        inputs = opened(settings)
        actors = ppo.load_actors(settings, inputs)
        rollout, _ = ppo.collect(settings, inputs, actors, 0)
        batches = list(ppo.mini_batches(settings, rollout, 0))
        assert len(batches) == 6 and len({b.members.tobytes() for b in batches}) > 2
        for epoch in range(3):
            both = np.concatenate([b.members for b in batches[2 * epoch : 2 * epoch + 2]])
            assert sorted(both.tolist()) == list(range(16))
        taken[most] = ppo.improve(settings, actors, rollout, 0).get("updates")
        state = actors.optimizer.state_dict()
        steps = {int(value) for name, value in state.items() if name.startswith("step.")}
        assert steps == {6 if taken[most] is None else taken[most]}
    # Of the first mini-batch it is 0 but for rounding; the second's is after a step.
    assert taken[None] is None and taken[1e3] == 6 and taken[1e-9] in (1, 2)


def test_a_run_ends_where_its_kl_is_too_large(pocket, tmp_path):
    settings = recipe(
        pocket, algorithm="grpo", group_size=4, iterations=9, max_kl=0.02, beta=0.0,
        train={"lr": 3e-3},
    )  # fmt: skip
    ppo.run(settings, tmp_path / "run")
    lines = [line for line in logged(tmp_path / "run") if "kl_k1" in line]
    assert 1 < len(lines) < 9
    assert lines[-1]["kl_k1"] > 0.02 > max(line["kl_k1"] for line in lines[:-1])
    # No step was taken on the rollout that was too far.
    assert "policy_loss" in lines[-2] and "policy_loss" not in lines[-1]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["ended"].startswith("kl_k1") and report["iterations"] == len(lines)


def test_estimates_of_the_kl_agree_with_the_sum_over_the_vocabulary(pocket, monkeypatch):
    """k1 and k3 within 4 standard errors, and k2, which is biased by what is of third order, of a
    policy that has moved a little."""
    settings = recipe(pocket, exact_kl=True, batch_size=384)
    inputs = opened(settings, 100)
    actors = ppo.load_actors(settings, inputs)
    perturb(actors.policy, 0.02)
    rollout, numbers = ppo.collect(settings, inputs, actors, 0)
    reading = (rollout.examples, 1.0, 4096)
    exact = logprobs.response_kl(inputs.reference, actors.policy, *reading)
    assert numbers["kl_exact"] == pytest.approx(float(exact.sum()) / 384, rel=1e-5)
    assert (exact > 0).all() and numbers["kl_exact"] > 0.01
    for estimator in ("k1", "k2", "k3"):
        off = advantages.kl(rollout.logprob, rollout.reference, estimator) - exact
        assert abs(float(off.mean())) < 4 * float(off.std()) / len(off) ** 0.5, estimator
    # In tiles of a few rows it is the same.
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 3 * inputs.result.config.vocab_size)
    again = logprobs.response_kl(inputs.reference, actors.policy, rollout.examples, 1.0, 40)
    torch.testing.assert_close(again, exact, rtol=1e-3, atol=1e-6)


def test_exact_kl_of_a_large_vocabulary_is_refused(pocket):
    with pytest.raises(InputError, match="exact_kl: a vocabulary of 32000 tokens"):
        ppo.check_exact_kl(recipe(pocket), 32000)
    for keys in ({"frozen": "sharded"}, {"parallel.tensor": 2}):
        with pytest.raises(InputError, match="exact_kl: it reads policy and reference side"):
            ppo.check_exact_kl(recipe(pocket, **keys), 100)


def test_what_a_response_earns(pocket):
    """Less a penalty by the character, normalised in each of the ways."""
    texts, rewards = ("yes", "no", "yes", "sorry"), (3.0, -1.0, 3.0, 2.0)
    responses = [
        dataclasses.replace(problem.response(text), reward=reward)
        for text, reward in zip(texts, rewards, strict=True)
    ]
    plain = torch.tensor(rewards) - 0.5 * torch.tensor([3.0, 2.0, 3.0, 5.0])

    def earned(**settings):
        given = recipe(pocket, length_penalty=0.5, group_size=2, **settings)
        return experience.final_rewards(
            given, experience.Adaptive(), responses, torch.device("cpu")
        )

    torch.testing.assert_close(earned(reward_normalization="none"), plain)
    torch.testing.assert_close(earned(), advantages.whiten(plain))
    torch.testing.assert_close(earned(reward_normalization="running"), advantages.whiten(plain))
    expected = torch.cat([advantages.whiten(plain[:2]), advantages.whiten(plain[2:])])
    torch.testing.assert_close(earned(reward_normalization="group"), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "grpo", "group_size": 4, "lam": 0.9}, "lam: grpo has no use for it"),
        ({"algorithm": "rloo", "group_size": 4, "value_clip": 0.1}, "value_clip: rloo has no use"),
        ({"algorithm": "reinforce++", "critic_lr": 1e-5}, "critic_lr: reinforce\\+\\+ has no use"),
        ({"algorithm": "grpo", "group_size": 4, "value_coefficient": 1.0}, "value_coefficient: g"),
        ({"algorithm": "rloo", "group_size": 4, "gamma": 0.9}, "gamma: rloo has no use for it"),
        ({"algorithm": "rloo", "group_size": 4, "average": "token"}, "average: rloo has no use"),
        ({"divide_by_std": False}, "divide_by_std: ppo has no use for it"),
        ({"algorithm": "grpo"}, "group_size: grpo compares a prompt's responses"),
        ({"group_size": 3}, "batch_size: 16 is no multiple of group_size 3"),
        ({"group_size": 4, "mini_batch_size": 6}, "mini_batch_size: 6 is no multiple"),
        ({"reward_normalization": "group"}, "group_size: expected at least 2"),
        (
            {"algorithm": "rloo", "group_size": 4, "reward_normalization": "group"},
            "reward_normalization: rloo takes a group's mean off",
        ),
        ({"kl_horizon": 64}, "kl_horizon: only with kl_target"),
        ({"kl_target": 6.0, "beta": 0.0}, "one of 0 stays 0"),
        ({"kl_target": 6.0, "kl_horizon": 1}, "more than a fifth of batch_size"),
    ],
)
def test_keys_that_would_do_nothing_are_refused_by_name(pocket, settings, message):
    with pytest.raises(ValidationError, match=message):
        recipe(pocket, **settings)


def test_a_dry_run_knows_that_there_is_no_critic(pocket):
    def shape(folder):
        return loading.load_llama(folder, device="meta")[0].config

    names = {}
    for algorithm in ("ppo", "grpo"):
        settings = recipe(pocket, algorithm=algorithm, group_size=4, epochs=2)
        work = ppo.plan(settings, None, lambda _: shape(pocket.sft))
        names[algorithm] = [model.name for model in work.trained]
        assert work.steps.value == settings.iterations * 4
        readers = [model.name for model in work.phases[0].sampling.readers]
        assert ("critic" in readers) == (algorithm == "ppo")
    assert names == {"ppo": ["policy", "critic"], "grpo": ["policy"]}
