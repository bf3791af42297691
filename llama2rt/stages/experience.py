"""A rollout of PPO and its relatives: what was sampled, and what each of its tokens was worth.

Phases in order: sample, score, recompute log-probabilities, shape rewards, estimate advantages. All
of it runs on packed response tokens; log-probabilities are always those of the sampling
temperature. Randomness is derived from (seed, iteration) alone, so a resumed run draws what the
first one would have drawn.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llama2rt.algorithms import advantages
from llama2rt.algorithms.rewards import length_penalty
from llama2rt.data.packing import Example
from llama2rt.data.shared import pack_shared
from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel import Mesh
from llama2rt.parallel.tensor_group import gathered
from llama2rt.rollout import balance, metrics
from llama2rt.rollout.logprobs import segment_sums
from llama2rt.rollout.responses import Response, response_example
from llama2rt.rollout.sampling import Sampler, derived_seed, draw
from llama2rt.stages.inputs import RolloutInputs
from llama2rt.stages.ppo_recipe import PpoRecipe
from llama2rt.train.optimizer import Optimizer


@dataclass
class Adaptive:
    """What one iteration leaves to the next besides weights."""

    beta_factor: float = 1.0
    """what `kl_target` has made of the recipe's beta"""
    count: int = 0
    """rewards of all rollouts so far, with their mean and the sum of squared deviations from it"""
    mean: float = 0.0
    squares: float = 0.0
    ended: str = ""
    """why the run ends before its last iteration"""

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def normalize(self, rewards: Tensor) -> Tensor:
        """`rewards` [B] by mean and deviation of all there have been, these among them (Chan et
        al. 1979)."""
        wide = rewards.double()
        mean, squares = float(wide.mean()), float((wide - wide.mean()).square().sum())
        apart, count = mean - self.mean, self.count + len(rewards)
        self.squares += squares + apart**2 * self.count * len(rewards) / count
        self.mean += apart * len(rewards) / count
        self.count = count
        deviation = (self.squares / count + 1e-8) ** 0.5
        return (rewards - self.mean) / deviation


@dataclass(frozen=True)
class Actors:
    """The policy and its critic, and what samples and trains them."""

    policy: Llama
    critic: ScalarModel | None
    """None for algorithms without one, and then its optimizer too"""
    sampler: Sampler
    optimizer: Optimizer
    critic_optimizer: Optimizer | None
    mesh: Mesh
    """the processes that policy and critic are spread over"""
    adaptive: Adaptive = field(default_factory=Adaptive)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Of what is trained, by name."""
        found = {"policy": self.optimizer}
        return (
            found if self.critic_optimizer is None else {**found, "critic": self.critic_optimizer}
        )


@dataclass
class Rollout:
    """One iteration's experience. Token vectors are fp32 [R]: all response tokens, end to end."""

    examples: list[Example]
    cu_responses: Tensor  # int64 [B+1], over response tokens
    rewards: Tensor
    sampled: Tensor
    """log-probability as the sampler saw it"""
    logprob: Tensor
    """by the policy that sampled; 0 until it is `read`"""
    entropy: Tensor
    """of that policy, as logprob"""
    reference: Tensor
    """log-probability by the reference policy"""
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    """of the critic, as values"""
    read: bool = True
    """whether logprob and entropy are known, or the gradient step is still to find them"""


@dataclass(frozen=True)
class Sampled:
    """What was drawn and read, before it is worth anything."""

    responses: list[Response]
    examples: list[Example]
    sampled: Tensor
    logprob: Tensor
    entropy: Tensor
    reference: Tensor
    exact_kl: Tensor | None = None


def collect(
    recipe: PpoRecipe, inputs: RolloutInputs, actors: Actors, iteration: int | Literal["warm-up"]
) -> tuple[Rollout, dict[str, float]]:
    """Sample `group_size` responses a prompt and work out what each of their tokens was worth. The
    critic's warm-up answers the first iteration's prompts, with random numbers of its own."""
    drawn = _sample(recipe, inputs, actors, iteration)
    device = drawn.reference.device
    values = None
    if actors.critic is not None:
        with gathered(actors.critic, actors.mesh, recipe.train.dtype) as value_model:
            values = balance.values(value_model, drawn.examples, recipe.train.micro_tokens)
    lengths = torch.tensor([len(r.tokens) for r in drawn.responses], device=device)
    cu_responses = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    final = final_rewards(recipe, actors.adaptive, drawn.responses, device)
    rollout = estimate(recipe, actors.adaptive, drawn, final, cu_responses, values)

    numbers = {**metrics.summary(drawn.responses), **_explained(rollout)}
    if rollout.read:
        numbers |= policy_measures(rollout)
    if drawn.exact_kl is not None:
        numbers["kl_exact"] = float(drawn.exact_kl.sum() / len(drawn.responses))
    return rollout, numbers


def policy_measures(rollout: Rollout) -> dict[str, float]:
    """What its policy's log-probabilities say of a rollout."""
    return {
        **metrics.kl_per_response(rollout.logprob, rollout.reference, len(rollout.examples)),
        "entropy": float(rollout.entropy.mean()),
        # Sampler and trainer must agree on what was sampled: more than rounding here is a bug.
        "sampler_gap": float((rollout.sampled - rollout.logprob).abs().max()),
    }


def _sample(
    recipe: PpoRecipe, inputs: RolloutInputs, actors: Actors, iteration: int | Literal["warm-up"]
) -> Sampled:
    """Sample, score (logit(Rc)), and recompute the log-probabilities of both policies: the newer
    one's where its gradient step does not."""
    micro_tokens, size = recipe.train.micro_tokens, recipe.group_size
    number = 0 if iteration == "warm-up" else iteration
    prompts = draw(inputs.prompts, recipe.batch_size // size, recipe.seed, number)
    seed = derived_seed(recipe.seed, "rollout", iteration)
    at: dict[str, Any] = {"temperature": recipe.temperature, "seed": seed}
    exact = None
    with gathered(actors.policy, actors.mesh, recipe.train.dtype) as policy:
        sampler = actors.sampler.of(policy)
        completions = sampler.complete(prompts, n=size, **at)
        responses = sampler.score(completions, prompts, **at)
        examples = [response_example(response) for response in responses]
        read: dict[str, Any] = {}
        if size > 1:  # a group's prompt is computed once
            read = {"together": [c.prompt_index for c in completions], "packed": pack_shared}
        reading = (examples, recipe.temperature, micro_tokens)
        if not recipe.reads_while_training:
            logprob, entropy = balance.logprobs(policy, *reading, **read)
        if recipe.exact_kl:
            exact = balance.exact_kl(inputs.reference, policy, *reading)
    reference, _ = balance.logprobs(inputs.reference, *reading, **read)
    if recipe.reads_while_training:
        logprob, entropy = torch.zeros_like(reference), torch.zeros_like(reference)
    sampled = torch.tensor([p for c in completions for p in c.logprobs], device=reference.device)
    return Sampled(responses, examples, sampled, logprob, entropy, reference, exact)


def final_rewards(
    recipe: PpoRecipe, adaptive: Adaptive, responses: Sequence[Response], device: torch.device
) -> Tensor:
    """What each response earns at its last token, fp32 [B]: logit(Rc) less the length penalty,
    normalised (by default over this iteration's batch: a running mean makes the reward depend on
    history), less the penalty of one that was cut."""
    reward = torch.tensor([response.reward for response in responses], device=device)
    cut = torch.tensor([not response.finished for response in responses], device=device)
    if recipe.length_penalty:
        characters = torch.tensor([len(response.text) for response in responses], device=device)
        reward = length_penalty(reward, characters, recipe.length_penalty)
    if recipe.reward_normalization == "whitened":
        reward = advantages.whiten(reward)
    elif recipe.reward_normalization == "running":
        reward = adaptive.normalize(reward)
    elif recipe.reward_normalization == "group":
        reward = advantages.whiten_groups(reward, recipe.group_size)
    return reward - recipe.missing_eos_penalty * cut


def estimate(
    recipe: PpoRecipe,
    adaptive: Adaptive,
    drawn: Sampled,
    final: Tensor,
    cu_responses: Tensor,
    values: Tensor | None,
) -> Rollout:
    """The rollout with its advantages, by the recipe's algorithm. `final` [B]: what responses earn
    at their ends."""
    beta = recipe.beta * adaptive.beta_factor
    ends, lengths = cu_responses[1:] - 1, cu_responses.diff()
    if recipe.algorithm == "grpo":  # its KL is in the loss
        rewards = torch.zeros_like(drawn.reference)
    else:
        rewards = -beta * advantages.kl(drawn.logprob, drawn.reference, "k1")
    rewards = rewards.index_add(0, ends, final)
    returns = None
    if recipe.algorithm == "grpo":
        each = advantages.group_relative(
            final, recipe.group_size, divide_by_std=recipe.divide_by_std
        )
        advantage = torch.repeat_interleave(each, lengths)
    elif recipe.algorithm == "rloo":
        earned = segment_sums(rewards, lengths)
        each = advantages.leave_one_out(earned, recipe.group_size)
        advantage = torch.repeat_interleave(each, lengths)
    elif values is None:  # REINFORCE++: returns are GAE's with lambda 1 and no values
        zeros = torch.zeros_like(rewards)
        advantage, _ = advantages.gae(rewards, zeros, cu_responses, recipe.gamma, 1.0)
        advantage = advantages.whiten(advantage)
    else:
        # Whitened over all response tokens (Ziegler et al. 2019).
        advantage, returns = advantages.gae(rewards, values, cu_responses, recipe.gamma, recipe.lam)
        advantage = advantages.whiten(advantage)
    logprobs = drawn.sampled, drawn.logprob, drawn.entropy, drawn.reference
    worth = advantage, values, returns
    read = not recipe.reads_while_training
    return Rollout(drawn.examples, cu_responses, rewards, *logprobs, *worth, read)


def _explained(rollout: Rollout) -> dict[str, float]:
    values, returns = rollout.values, rollout.returns
    if values is None or returns is None:
        return {}
    left = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    return {"value_explained_variance": float(1 - left)}
