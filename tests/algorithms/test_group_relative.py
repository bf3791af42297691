"""Advantages of GRPO, RLOO and REINFORCE++ and their losses, beside TRL's own statements and verl's
formulas, on the same log-probabilities and rewards."""

import ast
import importlib.util
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llama2rt.algorithms import advantages
from llama2rt.stages import ppo
from llama2rt.stages.experience import Adaptive, Rollout, Sampled, estimate
from llama2rt.stages.ppo_recipe import PpoRecipe

GROUP, GROUPS, LONGEST = 4, 3, 7
COUNT = GROUP * GROUPS
LENGTHS = [1, 7, 3, 4, 2, 2, 6, 5, 7, 1, 4, 3]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def recipe(**settings: Any) -> PpoRecipe:
    given = {
        "init": "init",
        "data": ["prompts.jsonl"],
        "rewards": {"helpfulness": "helpfulness"},
        "batch_size": COUNT,
        "mini_batch_size": COUNT,
        "group_size": GROUP,
        "sampling": {"max_tokens": LONGEST},
        "beta": 0.3,
    }
    return PpoRecipe(**{**given, **settings})


@pytest.fixture(scope="module")
def padded() -> SimpleNamespace:
    """Log-probabilities [B, T] of three policies, rewards [B], and which tokens are there."""
    generator = torch.Generator().manual_seed(0)

    def some(scale: float) -> torch.Tensor:
        return scale * torch.randn(COUNT, LONGEST, generator=generator)

    old = some(0.8) - 2
    return SimpleNamespace(
        old=old,
        now=old + some(0.2),  # ratios on both sides of the clip
        reference=old + some(0.3),
        rewards=torch.randn(COUNT, generator=generator) * 3,
        mask=(torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).float(),
    )


def flat(x: torch.Tensor) -> torch.Tensor:
    """Only the tokens that are there, end to end."""
    return torch.cat([row[:n] for row, n in zip(x, LENGTHS, strict=True)])


def rollout(padded: SimpleNamespace, **settings: Any) -> Rollout:
    """With advantages, as PPO's stage estimates them."""
    old, reference = flat(padded.old), flat(padded.reference)
    read = old, old, torch.zeros_like(old), reference
    drawn = Sampled([], [None] * COUNT, *read)  # type: ignore[list-item]
    cu_responses = torch.tensor([0, *np.cumsum(LENGTHS).tolist()])
    return estimate(recipe(**settings), Adaptive(), drawn, padded.rewards, cu_responses, None)


def first(experience: Rollout) -> torch.Tensor:
    """The advantage of each response at its first token."""
    return experience.advantages[experience.cu_responses[:-1]]


def ours(
    padded: SimpleNamespace, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """(loss, its gradient by the log-probabilities [B, T], metrics)."""
    now = padded.now.clone().requires_grad_(True)
    experience = rollout(padded, **settings)
    batch = ppo.MiniBatch(np.arange(COUNT), sum(LENGTHS))
    members = torch.arange(COUNT)
    loss, sums = ppo.policy_loss(recipe(**settings), experience, flat(now), members, 0.3, batch)
    loss.backward()
    return loss.detach(), now.grad, sums


class Trl:
    """Statements of the installed TRL, without importing it, which takes seconds."""

    def __init__(self, module: str) -> None:
        spec = importlib.util.find_spec("trl")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("trl is not installed")
        folder = Path(spec.submodule_search_locations[0], "trainer")
        self.tree, utilities = (
            ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
            for name in (module, "utils")
        )
        wanted = ("nanstd", "nanmin", "nanmax")
        found = [n for n in utilities.body if getattr(n, "name", "") in wanted]
        self.names: dict[str, Any] = {"torch": torch, "gather": lambda x: x, "device": "cpu"}
        self.run(found)

    def run(self, statements: list[ast.stmt], /, **names: Any) -> dict[str, Any]:
        """What is known after them: `names`, what TRL's modules define, and what they assign."""
        known = self.names | names if names else self.names
        exec(compile(ast.Module(statements, []), "trl", "exec"), known)
        return known

    def method(self, name: str) -> ast.FunctionDef:
        """Without its annotations, whose names are not known here."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        raise AssertionError(f"TRL has no {name} any more")


def test_advantages_of_grpo_are_trls(padded):
    trl = Trl("grpo_trainer")
    (branch,) = (
        node
        for node in ast.walk(trl.method("_generate_and_score_completions"))
        if isinstance(node, ast.If) and "'sum_then_normalize'" in ast.unparse(node.test)
    )
    for scale, divided in (("group", True), ("none", False)):
        found = trl.run(
            branch.body,
            self=SimpleNamespace(reward_weights=torch.ones(1), scale_rewards=scale),
            rewards_per_func=padded.rewards[:, None],
            unscorable_mask=torch.zeros(COUNT, dtype=torch.bool),
            num_generations=GROUP,
        )
        experience = rollout(padded, algorithm="grpo", divide_by_std=divided)
        torch.testing.assert_close(first(experience), found["advantages"], **CLOSE)
        lengths = torch.tensor(LENGTHS)
        everywhere = torch.repeat_interleave(first(experience), lengths)
        assert torch.equal(experience.advantages, everywhere)


def test_advantages_of_rloo_are_trls(padded):
    trl = Trl("rloo_trainer")
    body = trl.method("_generate_and_score_completions").body
    starts = [ast.unparse(node) for node in body]
    begin = next(i for i, text in enumerate(starts) if text.startswith("rewards = (rewards_per"))
    end = next(i for i, t in enumerate(starts) if t.startswith("advantages = torch.nan_to_num"))
    found = trl.run(
        body[begin : end + 1],
        self=SimpleNamespace(
            reward_weights=torch.ones(1), reward_clip_range=None, beta=0.3,
            normalize_advantages=False,
        ),
        rewards_per_func=padded.rewards[:, None],
        unscorable_mask=torch.zeros(COUNT, dtype=torch.bool),
        num_generations=GROUP,
        old_per_token_logps=padded.old,
        ref_per_token_logps=padded.reference,
        completion_mask=padded.mask,
    )  # fmt: skip
    experience = rollout(padded, algorithm="rloo")
    torch.testing.assert_close(first(experience), found["advantages"], **CLOSE)


def trl_loss(
    module: str, padded: SimpleNamespace, advantage: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of TRL's trainer and its gradient by the log-probabilities [B, T]."""
    trl = Trl(module)
    method = trl.method("_compute_loss")
    compute = trl.run([method])["_compute_loss"]
    now = padded.now.clone().requires_grad_(True)
    one = torch.ones(COUNT, 1)
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    host = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.3,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        model=SimpleNamespace(training=False),
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        accelerator=same,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **settings,
    )
    inputs = {
        "prompt_ids": one, "prompt_mask": one,
        "completion_ids": padded.mask, "completion_mask": padded.mask,
        "advantages": advantage, "old_per_token_logps": padded.old,
        "ref_per_token_logps": padded.reference, "old_logps": (padded.old * padded.mask).sum(1),
    }  # fmt: skip
    loss = compute(host, None, inputs)
    loss.backward()
    assert now.grad is not None
    return loss.detach(), now.grad


@pytest.mark.parametrize(
    ("average", "loss_type"), [("response", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")]
)
def test_losses_of_grpo_are_trls(padded, average, loss_type):
    """With its k3 in the loss, ratios beyond the clip among them."""
    loss, gradient, sums = ours(padded, algorithm="grpo", average=average)
    assert sums["clip_fraction"] > 0
    advantage = first(rollout(padded, algorithm="grpo"))
    theirs, expected = trl_loss("grpo_trainer", padded, advantage, loss_type=loss_type)
    torch.testing.assert_close(loss, theirs, **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_loss_of_rloo_is_trls(padded):
    loss, gradient, sums = ours(padded, algorithm="rloo")
    assert 0 < sums["clip_fraction"] < COUNT
    advantage = first(rollout(padded, algorithm="rloo"))
    theirs, expected = trl_loss("rloo_trainer", padded, advantage)
    torch.testing.assert_close(loss, theirs, **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)


def restated(padded: SimpleNamespace, what: str, index: list[int]) -> torch.Tensor:
    """verl's estimators (core_algos, 0.5), restated: per token [B, T]."""
    rewards = padded.rewards.tolist()
    others = {p: [r for r, q in zip(rewards, index, strict=True) if q == p] for p in index}
    if what == "reinforce++":
        earned = -0.3 * (padded.old - padded.reference) * padded.mask
        earned[torch.arange(COUNT), torch.tensor(LENGTHS) - 1] += padded.rewards
        returns = earned.flip(1).cumsum(1).flip(1)
        there = flat(returns)
        # Its variance is the sample's, ours the population's, as of every whitening here.
        deviation = torch.sqrt(there.var(correction=1) + 1e-8)
        return (returns - there.mean()) / deviation * padded.mask
    found = []
    for reward, prompt in zip(rewards, index, strict=True):
        group = torch.tensor(others[prompt])
        if what == "grpo":
            found.append((reward - group.mean()) / (group.std() + 1e-6))
        elif what == "dr_grpo":
            found.append(reward - group.mean())
        else:
            n = len(group)
            found.append(reward * n / (n - 1) - group.mean() * n / (n - 1))
    return torch.stack(found)[:, None] * padded.mask


def test_advantages_are_verls(padded):
    index = [i // GROUP for i in range(COUNT)]
    for divided, name in ((True, "grpo"), (False, "dr_grpo")):
        found = advantages.group_relative(padded.rewards, GROUP, divide_by_std=divided, eps=1e-6)
        torch.testing.assert_close(found, restated(padded, name, index)[:, 0], **CLOSE)
    found = advantages.leave_one_out(padded.rewards, GROUP)
    torch.testing.assert_close(found, restated(padded, "rloo", index)[:, 0], **CLOSE)
    experience = rollout(padded, algorithm="reinforce++", group_size=1)
    tokens = sum(LENGTHS)
    bessel = ((tokens - 1) / tokens) ** 0.5
    expected = flat(restated(padded, "reinforce++", index))
    torch.testing.assert_close(experience.advantages * bessel, expected, **CLOSE)


def test_averages_are_verls(padded):
    """token-mean, seq-mean-token-mean, and seq-mean-token-sum over the constant."""
    experience = rollout(padded, algorithm="reinforce++")
    advantage = torch.zeros(COUNT, LONGEST)
    advantage[padded.mask.bool()] = experience.advantages
    ratio = (padded.now - padded.old).exp()
    token = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)) * padded.mask
    sums = token.sum(1)
    expected = {
        "token": token.sum() / padded.mask.sum(),
        "response": (sums / padded.mask.sum(1)).mean(),
        "constant": sums.mean() / LONGEST,
    }
    for average, value in expected.items():
        loss, *_ = ours(padded, algorithm="reinforce++", average=average)
        torch.testing.assert_close(loss, value, **CLOSE)


@pytest.mark.parametrize("size", [3, 5, 7, 12])
@pytest.mark.parametrize("worth", [0.1, 27.631021, 1000.1])
def test_equal_rewards_have_no_advantage(size, worth):
    """What the mean is rounded by would be up to 0.37 of TRL's deviation, 0.9 of verl's."""
    rewards = torch.full((2 * size,), worth)
    rewards[0] += 1
    for advantage in (
        advantages.group_relative(rewards, size),
        advantages.group_relative(rewards, size, divide_by_std=False),
        advantages.leave_one_out(rewards, size),
        advantages.whiten_groups(rewards, size),
    ):
        assert advantage[0] > 0 and not advantage[size:].any()


def test_groups_that_are_none_are_refused():
    for size in (0, 1, 4):
        with pytest.raises(ValueError, match="groups of"):
            advantages.group_relative(torch.zeros(6), size)
    with pytest.raises(ValueError, match="groups of"):
        advantages.leave_one_out(torch.zeros(6, 1), 2)


def test_beta_is_adapted_as_ziegler_et_al_do():
    """Twice the target: clipped to a fifth; with K = 0.1, 2 % an iteration."""
    assert advantages.kl_adjustment(12.0, 6.0, 1000, 10_000) == pytest.approx(1.02)
    assert advantages.kl_adjustment(6.6, 6.0, 1000, 10_000) == pytest.approx(1.01)
    assert advantages.kl_adjustment(6.0, 6.0, 1000, 10_000) == 1.0
    assert advantages.kl_adjustment(0.0, 6.0, 512, 10_000) == pytest.approx(1 - 0.2 * 0.0512)


def test_running_statistics_are_those_of_all_rewards():
    generator = torch.Generator().manual_seed(1)
    batches = [5 + 3 * torch.randn(n, generator=generator) for n in (8, 3, 20)]
    adaptive = Adaptive()
    found = [adaptive.normalize(batch) for batch in batches]
    seen = torch.cat(batches)
    expected = (batches[-1] - seen.mean()) / seen.std(correction=0)
    torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-5)
    again = Adaptive()
    again.restore(adaptive.state())
    assert torch.equal(again.normalize(batches[0]), adaptive.normalize(batches[0]))
    assert not Adaptive().normalize(torch.full((7,), 1000.1)).any()


def test_exact_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, 11, generator=generator)
    p, q = (torch.distributions.Categorical(logits=x) for x in (policy, reference))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(advantages.exact_kl(policy, reference), expected)
    assert not advantages.exact_kl(policy, policy).any()
