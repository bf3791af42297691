"""PPO (section 3.2.3): the policy is moved towards what two reward models prefer, on a KL leash.

One iteration, its phases in order: sample, score, recompute log-probabilities, shape rewards,
estimate advantages, take one gradient step per mini-batch. Everything runs on packed response
tokens; log-probabilities are always those of the sampling temperature. An iteration's randomness is
derived from (seed, iteration) alone, so a resumed run draws what the first one would have drawn.
Before the first iteration one rollout goes to the critic's head alone (`stages.critic`).

Left out: several epochs over a rollout, shared policy and critic trunks, adaptive KL.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from llama2rt import report
from llama2rt.algorithms import advantages, losses
from llama2rt.checkpoint.store import prefixed, unprefixed
from llama2rt.data.loader import shared_groups
from llama2rt.data.packing import Example, filler, pack
from llama2rt.data.sources import Source
from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel import Mesh, broadcast
from llama2rt.parallel.tensor_group import gathered
from llama2rt.rollout import balance, metrics
from llama2rt.rollout.logprobs import token_rows
from llama2rt.rollout.responses import response_example
from llama2rt.rollout.reward import ScoringOptions
from llama2rt.rollout.sampling import Sampler, derived_seed, draw
from llama2rt.run import Change, Run
from llama2rt.stages import adapters, critic, loading, mixing, plans, spread
from llama2rt.stages.inputs import RolloutInputs, RolloutRecipe, open_rollout
from llama2rt.train import driver
from llama2rt.train.driver import Step
from llama2rt.train.lora import LoraWithoutDropout
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions
from llama2rt.train.schedule import learning_rate, warn_of_warmup

# What report.json says of the policy that is kept.
PICKED_BY = (
    "objective on held-out prompts: the mean over the kinds of prompts of Rc in (0, 1), divided by "
    "unit, the standard deviation of the first policy's Rc, less beta times kl_k1"
)


class PpoRecipe(RolloutRecipe):
    """Improve a policy on prompts with PPO and two reward models."""

    init: Path
    """the policy to start from: SFT, or the rejection-sampled version (V5 in the paper)"""
    rewards: ScoringOptions
    """the models that rank responses; the critic starts from the layers of the helpfulness model,
    under a head that is fitted to the returns of one rollout of init"""
    validation: list[Source] = Field(default=[])
    """held-out prompts for early stopping, which keeps the policy with the best objective: the mean
    over the kinds of prompts of Rc in (0, 1), in standard deviations of the first policy's, less
    beta times the KL. Without them the last iteration's policy is kept"""

    iterations: int = Field(default=400, gt=0)
    """200-400 in the paper"""
    batch_size: int = Field(default=512, gt=0)
    """responses an iteration"""
    mini_batch_size: int = Field(default=64, gt=0)
    """responses a gradient step; each is used once"""
    clip: float = Field(default=0.2, gt=0, allow_inf_nan=True)
    """how far a token's probability ratio may move from 1 and still be pushed"""
    beta: float = Field(default=0.01, ge=0)
    """KL penalty, in whitened reward per nat (0.01 for 7B and 13B, 0.005 for 34B and 70B)"""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """discount; like lam and the two value settings not in Llama 2: those of Ziegler et al. 2019"""
    lam: float = Field(default=0.95, ge=0, le=1)
    """of generalised advantage estimation"""
    value_coefficient: float = Field(default=0.1, gt=0)
    """scale of the critic's loss; the critic's own AdamW undoes it but for gradient clipping"""
    value_clip: float = Field(default=0.2, gt=0, allow_inf_nan=True)
    """how far a value may move from the rollout's and still be pushed"""

    critic_lr: float | None = Field(default=9e-6, gt=0)
    """constant (Ouyang et al. 2022, appendix C.4); None for train.lr"""
    temperature: float = Field(default=1.0, gt=0)
    """of sampling, and of every log-probability"""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """taken off the whitened reward (so: in standard deviations) of a cut response"""
    patience: int = Field(default=5, gt=0)
    """evaluations without a better objective before stopping"""

    # Constant lr 1e-6; AdamW 0.9 / 0.95 / 1e-5, weight decay 0.1, clip 1.0 as in pretraining. A
    # step of its checkpoint_every and validate_every is an iteration.
    train: TrainOptions = TrainOptions(
        lr=1e-6, schedule="constant", checkpoint_every=10, validate_every=10
    )
    lora: LoraWithoutDropout = LoraWithoutDropout()

    neutral: ClassVar = tuple(k for k in RolloutRecipe.neutral if k != "train.validate_every")
    durations: ClassVar[tuple[str, ...]] = ("iterations",)

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """As everywhere; but a run that measured its last policy out of turn, which may have become
        the best one, cannot go on as if it had not."""
        every = self.train.validate_every
        if key == "iterations" and self.validation and (not every or begun[key] % every):
            return "refused"
        return super().change(key, begun)


@dataclass(frozen=True)
class Rollout:
    """One iteration's experience. Token vectors are fp32 [R]: all response tokens, end to end."""

    examples: list[Example]
    cu_responses: Tensor  # int64 [B+1], over response tokens
    rewards: Tensor
    logprob: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Actors:
    """The policy and its critic, and what samples and trains them."""

    policy: Llama
    critic: ScalarModel
    sampler: Sampler
    optimizer: Optimizer
    critic_optimizer: Optimizer
    mesh: Mesh
    """the processes that policy and critic are spread over"""


def run(recipe: PpoRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train until the iterations or the patience end; returns the folder of the policy with the
    best held-out objective (of the last one where nothing is held out)."""
    run = Run.open(directory, recipe, inputs=loading.file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    warn_of_warmup(recipe.iterations, recipe.train)
    actors = load_actors(recipe, inputs)
    work = Iterations(recipe, inputs, actors, run)
    done = driver.resume(run, work)
    if done == 0:
        work.start()
    done = driver.drive(run, work, recipe.train, done=done, total=recipe.iterations)
    if not inputs.held_out:
        adapters.save(actors.policy, inputs.tokenizer, run, recipe.init)
    picked = {"picked_by": PICKED_BY} if inputs.held_out else {}
    report.finish(run, {"iterations": done, **picked, **work.best})
    return run.model_directory


# The critic, which is as the helpfulness model is, is trained beside the policy.
open_inputs = functools.partial(open_rollout, trained=("init", "rewards.helpfulness"))
plan = plans.of_ppo


class Iterations:
    """The driver's work: a step is an iteration, with its sampling and scoring. Where prompts are
    held out, the run's model folder has the best policy so far."""

    noun = "iteration"
    ceiling: float | None = None  # most of an iteration is sampling: no throughput of training

    def __init__(self, recipe: PpoRecipe, inputs: RolloutInputs, actors: Actors, run: Run) -> None:
        self.recipe, self.inputs, self.actors, self.run = recipe, inputs, actors, run
        self.device = next(actors.policy.parameters()).device
        self.best: dict[str, float] = {}
        self.waited = 0
        self.score_unit: float | None = None

    def start(self) -> None:
        """Measure the policy as it comes, and fit the critic's head."""
        # Step 0 is measured before the first checkpoint exists, and again if killed before it.
        self.run.truncate_metrics(-1)
        numbers = self.validate(0)
        if numbers is not None:
            self.run.log(0, **numbers)
        self.run.log(0, critic_warm_up=start_critic(self.recipe, self.inputs, self.actors))

    def step(self, index: int) -> Step:
        rollout, measured = collect(self.recipe, self.inputs, self.actors, index)
        measured |= improve(self.recipe, self.actors, rollout, index)
        return Step(measured, tokens=len(rollout.logprob))

    def describe(self, metrics: Mapping[str, Any]) -> str:
        return f"reward {metrics['reward']:.3f} KL {metrics['kl_k1']:.3f}"

    def validate(self, done: int) -> dict[str, float] | None:
        if not self.inputs.held_out:
            return None
        path = self.run.samples_directory / f"{done:05d}.jsonl"
        # Rank 0's, so that none stops, or saves, where another's last bit says otherwise.
        numbers = broadcast(measure(self.recipe, self.inputs, self.actors, path, self.score_unit))
        self.score_unit = numbers["unit"]
        self.waited += 1
        if not self.best or numbers["objective"] > self.best["objective"]:
            self.waited, self.best = 0, {"iteration": done, **numbers}
            adapters.save(self.actors.policy, self.inputs.tokenizer, self.run, self.recipe.init)
        return {f"held_out/{name}": value for name, value in numbers.items()}

    def finished(self) -> bool:
        return self.waited >= self.recipe.patience

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = prefixed(self.actors.optimizer.state_dict(), "policy.")
        tensors |= prefixed(self.actors.critic_optimizer.state_dict(), "critic.")
        return tensors, {"waited": self.waited, "best": self.best, "unit": self.score_unit}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.waited, self.best, self.score_unit = state["waited"], state["best"], state["unit"]
        self.actors.optimizer.load_state_dict(unprefixed(tensors, "policy."))
        self.actors.critic_optimizer.load_state_dict(unprefixed(tensors, "critic."))


def load_actors(recipe: PpoRecipe, inputs: RolloutInputs) -> Actors:
    """Policy and critic for their optimizers."""
    options = recipe.train
    mesh = Mesh.build(recipe.parallel, inputs.result.config)
    policy = inputs.to_train_on(recipe.init, mesh)
    build_critic = functools.partial(critic.initial_model, recipe, inputs.tokenizer)
    value_model = spread.from_folder(build_critic, recipe.rewards.scoring, mesh, options)
    critic_options = options.model_copy(update={"lr": recipe.critic_lr or options.lr})
    return Actors(
        policy=policy,
        critic=value_model,
        sampler=inputs.sampler(policy, str(recipe.init)),
        optimizer=Optimizer(policy, options, mesh),
        critic_optimizer=Optimizer(value_model, critic_options, mesh),
        mesh=mesh,
    )


def start_critic(recipe: PpoRecipe, inputs: RolloutInputs, actors: Actors) -> float:
    """Give the critic the head that explains one rollout's returns best (`critic.warm_up`)."""
    rollout, _ = collect(recipe, inputs, actors, "warm-up")
    experience = rollout.examples, rollout.rewards, rollout.cu_responses, recipe.gamma
    # Every rank, or tensor group, for itself on all responses: one forward pass, once a run.
    with gathered(actors.critic, actors.mesh, recipe.train.dtype) as model:
        weight, explained = critic.warm_up(model, *experience, recipe.train.micro_tokens)
    critic.set_head(actors.critic, actors.critic_optimizer, weight)
    return explained


def collect(
    recipe: PpoRecipe, inputs: RolloutInputs, actors: Actors, iteration: int | Literal["warm-up"]
) -> tuple[Rollout, dict[str, float]]:
    """Sample one response a prompt and work out what each of its tokens was worth. The critic's
    warm-up answers the first iteration's prompts, with random numbers of its own."""
    micro_tokens = recipe.train.micro_tokens
    number = 0 if iteration == "warm-up" else iteration
    prompts = draw(inputs.prompts, recipe.batch_size, recipe.seed, number)

    # Sample, and score: logit(Rc).
    seed = derived_seed(recipe.seed, "rollout", iteration)
    drawn: dict[str, Any] = {"temperature": recipe.temperature, "seed": seed}
    with gathered(actors.policy, actors.mesh, recipe.train.dtype) as policy:
        sampler = actors.sampler.of(policy)
        completions = sampler.complete(prompts, **drawn)
        responses = sampler.score(completions, prompts, **drawn)
        # Recompute, at the sampling temperature: log-probabilities of both policies, values.
        examples = [response_example(response) for response in responses]
        logprob, entropy = balance.logprobs(policy, examples, recipe.temperature, micro_tokens)
    reference, _ = balance.logprobs(inputs.reference, examples, recipe.temperature, micro_tokens)
    with gathered(actors.critic, actors.mesh, recipe.train.dtype) as value_model:
        values = balance.values(value_model, examples, micro_tokens)
    device = logprob.device
    reward = torch.tensor([response.reward for response in responses], device=device)
    cut = torch.tensor([not response.finished for response in responses], device=device)

    # Shape: whitened over this iteration's batch (the paper names no population; a running mean
    # would make the reward depend on history), paid at the last token, the KL penalty at each.
    lengths = torch.tensor([len(response.tokens) for response in responses], device=device)
    cu_responses = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rewards = -recipe.beta * advantages.kl(logprob, reference, "k1")
    final = advantages.whiten(reward) - recipe.missing_eos_penalty * cut
    rewards = rewards.index_add(0, cu_responses[1:] - 1, final)

    # Estimate, and whiten the advantages over all response tokens (Ziegler et al. 2019).
    advantage, returns = advantages.gae(rewards, values, cu_responses, recipe.gamma, recipe.lam)
    rollout = Rollout(
        examples, cu_responses, rewards, logprob, values, advantages.whiten(advantage), returns
    )
    sampled = torch.tensor([p for c in completions for p in c.logprobs], device=device)
    numbers = {
        **metrics.summary(responses),
        **metrics.kl_per_response(logprob, reference, len(responses)),
        "entropy": float(entropy.mean()),
        "value_explained_variance": float(
            1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        ),
        # Sampler and trainer must agree on what was sampled: more than rounding here is a bug.
        "sampler_gap": float((sampled - logprob).abs().max()),
    }
    return rollout, numbers


def improve(
    recipe: PpoRecipe, actors: Actors, rollout: Rollout, iteration: int
) -> dict[str, float]:
    """One gradient step of policy and critic per mini-batch, each response used once. Ranks share a
    mini-batch; what is averaged is averaged over all of its tokens."""
    options = recipe.train
    device = actors.policy.output.weight.device
    count = len(rollout.examples)
    order = np.random.default_rng([recipe.seed, 1, iteration]).permutation(count)
    lengths = [len(example.tokens) for example in rollout.examples]
    sums = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0}
    norms: list[list[float]] = []
    for begin in range(0, count, recipe.mini_batch_size):
        members = order[begin : begin + recipe.mini_batch_size]
        tokens = int(rollout.cu_responses.diff()[torch.from_numpy(members)].sum())
        own, missing = shared_groups(
            [lengths[i] for i in members], options.micro_tokens, actors.mesh.share
        )
        for group in own + [[]] * missing:
            packed = members[group]
            examples = [rollout.examples[i] for i in packed]
            batch = (pack(examples) if examples else filler()).to(device)
            rows = token_rows(rollout.cu_responses, torch.from_numpy(packed).to(device))
            predicts = batch.targets >= 0

            logprob = actors.policy(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                batch.targets,
                temperature=recipe.temperature,
            )[predicts]
            policy_loss, clipped = losses.policy_clip(
                logprob, rollout.logprob[rows], rollout.advantages[rows], recipe.clip
            )
            (policy_loss.sum() / tokens).backward()
            actors.optimizer.accumulate()

            values = actors.critic(batch.tokens, batch.positions, batch.cu_seqlens)[predicts]
            value_loss, _ = losses.value_clip(
                values, rollout.values[rows], rollout.returns[rows], recipe.value_clip
            )
            (recipe.value_coefficient * value_loss.sum() / tokens).backward()
            actors.critic_optimizer.accumulate()

            sums["policy_loss"] += float(policy_loss.detach().sum())
            sums["value_loss"] += float(value_loss.detach().sum())
            sums["clip_fraction"] += float(clipped.sum())
        norms.append(
            [
                optimizer.step(learning_rate(iteration, recipe.iterations, optimizer.options))
                for optimizer in (actors.optimizer, actors.critic_optimizer)
            ]
        )
    tokens = len(rollout.logprob)
    totals = zip(sums, actors.mesh.totals(sums.values()), strict=True)
    gradient_norm, critic_gradient_norm = np.mean(norms, axis=0)
    return {
        **{name: total / tokens for name, total in totals},
        "gradient_norm": float(gradient_norm),
        "critic_gradient_norm": float(critic_gradient_norm),
        **actors.optimizer.outliers.metrics(),
        **{f"critic_{k}": v for k, v in actors.critic_optimizer.outliers.metrics().items()},
    }


def measure(
    recipe: PpoRecipe,
    inputs: RolloutInputs,
    actors: Actors,
    path: Path,
    unit: float | None = None,
) -> dict[str, float]:
    """The policy as it is now on the held-out prompts, with the same random numbers every time.

    `objective` is the paper's on what no logit can inflate: Rc in (0, 1), averaged over prompts of
    each kind and then over the kinds, divided by `unit`, the standard deviation of Rc among the
    first policy's answers (None: these are they), less beta times the KL.
    """
    with gathered(actors.policy, actors.mesh, recipe.train.dtype) as policy:
        numbers = metrics.measure(
            path,
            replace(actors.sampler.of(policy), policy=path.stem),
            inputs.reference,
            inputs.held_out,
            temperature=recipe.temperature,
            seed=derived_seed(recipe.seed, "held-out"),
        )
    unit = max(numbers["score_deviation"], 1e-3) if unit is None else unit
    objective = numbers["score"] / unit - recipe.beta * numbers["kl_k1"]
    return {"objective": objective, "unit": unit, **numbers}
