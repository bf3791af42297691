"""PPO (section 3.2.3): the policy is moved towards what two reward models prefer, on a KL leash.
And, as `algorithm` says, its relatives without a critic: GRPO, RLOO, REINFORCE++.

One iteration: a rollout (`stages.experience`: sample, score, recompute log-probabilities, shape
rewards, estimate advantages), then a gradient step per mini-batch. Everything runs on packed
response tokens. Before the first iteration one rollout goes to the critic's head alone
(`stages.critic`).

Left out: shared policy and critic trunks.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2rt import report
from llama2rt.algorithms import advantages, losses
from llama2rt.checkpoint.store import prefixed, unprefixed
from llama2rt.data.loader import Share, shared_groups
from llama2rt.data.packing import filler, pack
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError
from llama2rt.parallel import Mesh, broadcast
from llama2rt.parallel.tensor_group import gathered
from llama2rt.rollout import metrics
from llama2rt.rollout.logprobs import segment_sums, token_rows
from llama2rt.rollout.sampling import derived_seed
from llama2rt.run import Run
from llama2rt.stages import adapters, critic, loading, mixing, plans, spread
from llama2rt.stages.experience import Actors, Rollout, collect, policy_measures
from llama2rt.stages.inputs import RolloutInputs, open_rollout
from llama2rt.stages.loading import Future
from llama2rt.stages.ppo_recipe import EXACT_KL_VOCABULARY, PpoRecipe
from llama2rt.train import driver
from llama2rt.train.driver import Step
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.schedule import learning_rate, warn_of_warmup

# What report.json says of the policy that is kept.
PICKED_BY = (
    "objective on held-out prompts: the mean over the kinds of prompts of Rc in (0, 1), divided by "
    "unit, the standard deviation of the first policy's Rc, less beta times kl_k1"
)


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
    ended = {"ended": actors.adaptive.ended} if actors.adaptive.ended else {}
    report.finish(run, {"iterations": done, **ended, **picked, **work.best})
    return run.model_directory


def open_inputs(recipe: PpoRecipe, future: Future | None = None) -> RolloutInputs:
    """`open_rollout`. InputError too where the exact KL is asked for and cannot be had."""
    # The critic, which is as the helpfulness model is, is trained beside the policy.
    trained = ("init", "rewards.helpfulness") if recipe.has_critic else ("init",)
    inputs = open_rollout(recipe, future, trained)
    if recipe.exact_kl:
        check_exact_kl(recipe, inputs.result.config.vocab_size)
    return inputs


def check_exact_kl(recipe: PpoRecipe, vocabulary: int) -> None:
    """InputError where the KL is not summed over the vocabulary."""
    if vocabulary > EXACT_KL_VOCABULARY:
        raise InputError(
            f"exact_kl: a vocabulary of {vocabulary} tokens, expected at most "
            f"{EXACT_KL_VOCABULARY}; kl_k1 and kl_k3 are measured without it"
        )
    if recipe.frozen == "sharded" or (recipe.parallel.tensor or 1) > 1:
        raise InputError(
            "exact_kl: it reads policy and reference side by side, whole: expected frozen other "
            "than sharded, and parallel.tensor 1"
        )


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
        if self.recipe.has_critic:
            self.run.log(0, critic_warm_up=start_critic(self.recipe, self.inputs, self.actors))

    def step(self, index: int) -> Step:
        recipe, adaptive = self.recipe, self.actors.adaptive
        rollout, measured = collect(recipe, self.inputs, self.actors, index)
        tokens = len(rollout.reference)
        if recipe.max_kl is not None and (kl := measured["kl_k1"]) > recipe.max_kl:
            adaptive.ended = f"kl_k1 {kl:.4g} is more than max_kl {recipe.max_kl:g}"
            return Step(measured, tokens)
        measured |= improve(recipe, self.actors, rollout, index)
        if recipe.kl_target is not None:
            measured["beta"] = recipe.beta * adaptive.beta_factor
            adaptive.beta_factor *= advantages.kl_adjustment(
                measured["kl_k1"], recipe.kl_target, recipe.batch_size, recipe.kl_horizon
            )
        return Step(measured, tokens)

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
        return self.waited >= self.recipe.patience or bool(self.actors.adaptive.ended)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, optimizer in self.actors.optimizers.items():
            tensors |= prefixed(optimizer.state_dict(), f"{name}.")
        numbers = {"waited": self.waited, "best": self.best, "unit": self.score_unit}
        return tensors, {**numbers, "adaptive": self.actors.adaptive.state()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.waited, self.best, self.score_unit = state["waited"], state["best"], state["unit"]
        # A run that was begun before there was such a thing has left nothing.
        self.actors.adaptive.restore(state.get("adaptive", {}))
        for name, optimizer in self.actors.optimizers.items():
            optimizer.load_state_dict(unprefixed(tensors, f"{name}."))


def load_actors(recipe: PpoRecipe, inputs: RolloutInputs) -> Actors:
    """Policy and critic, if the algorithm has one, for their optimizers."""
    options = recipe.train
    mesh = Mesh.build(recipe.parallel, inputs.result.config)
    policy = inputs.to_train_on(recipe.init, mesh)
    value_model = critic_optimizer = None
    if recipe.has_critic:
        build = functools.partial(critic.initial_model, recipe, inputs.tokenizer)
        value_model = spread.from_folder(build, recipe.rewards.scoring, mesh, options)
        critic_options = options.model_copy(update={"lr": recipe.critic_lr or options.lr})
    sampler = inputs.sampler(policy, str(recipe.init))
    optimizer = Optimizer(policy, options, mesh)
    if value_model is not None:
        critic_optimizer = Optimizer(value_model, critic_options, mesh)
    return Actors(policy, value_model, sampler, optimizer, critic_optimizer, mesh)


def start_critic(recipe: PpoRecipe, inputs: RolloutInputs, actors: Actors) -> float:
    """Give the critic the head that explains one rollout's returns best (`critic.warm_up`)."""
    assert actors.critic is not None and actors.critic_optimizer is not None
    rollout, _ = collect(recipe, inputs, actors, "warm-up")
    experience = rollout.examples, rollout.rewards, rollout.cu_responses, recipe.gamma
    # Every rank, or tensor group, for itself on all responses: one forward pass, once a run.
    with gathered(actors.critic, actors.mesh, recipe.train.dtype) as model:
        weight, explained = critic.warm_up(model, *experience, recipe.train.micro_tokens)
    critic.set_head(actors.critic, actors.critic_optimizer, weight)
    return explained


class MiniBatch(NamedTuple):
    """What one gradient step trains on."""

    members: np.ndarray
    """of the rollout's responses, int64; a group's are neighbours"""
    tokens: int
    """of all of them, whichever rank has them"""

    def micro_batches(
        self, recipe: PpoRecipe, lengths: np.ndarray, share: Share
    ) -> list[np.ndarray]:
        """Members by micro-batch of one process of `share`, with empty ones where others have more.
        The responses of a group stay in one, which computes their prompt once, where they fit."""
        size = recipe.group_size
        units = self.members.reshape(-1, size)
        if size > 1 and lengths[units].sum(axis=1).max() > recipe.train.micro_tokens:
            units = self.members[:, None]
        totals = lengths[units].sum(axis=1).tolist()
        own, missing = shared_groups(totals, recipe.train.micro_tokens, share)
        return [units[group].ravel() for group in own] + [self.members[:0]] * missing


def mini_batches(recipe: PpoRecipe, rollout: Rollout, iteration: int) -> Iterator[MiniBatch]:
    """The rollout's responses, shuffled by whole groups, once an epoch."""
    size, count = recipe.group_size, len(rollout.examples)
    lengths = rollout.cu_responses.diff().cpu().numpy()
    random = np.random.default_rng([recipe.seed, 1, iteration])
    for _ in range(recipe.epochs):
        groups = random.permutation(count // size)
        order = (groups[:, None] * size + np.arange(size)).ravel()
        for begin in range(0, count, recipe.mini_batch_size):
            members = order[begin : begin + recipe.mini_batch_size]
            yield MiniBatch(members, int(lengths[members].sum()))


def improve(
    recipe: PpoRecipe, actors: Actors, rollout: Rollout, iteration: int
) -> dict[str, float]:
    """One gradient step of policy and critic per mini-batch. Ranks share a mini-batch; what is
    averaged is averaged over all of its tokens, or responses. With one that also reads the policy's
    log-probabilities, what they say is measured here."""
    lengths = np.array([len(example.tokens) for example in rollout.examples])
    sums: dict[str, float] = {}
    norms: list[list[float]] = []
    responses = tokens = 0
    for batch in mini_batches(recipe, rollout, iteration):
        before = sums.get("update_kl", 0.0)
        for members in batch.micro_batches(recipe, lengths, actors.mesh.share):
            for name, value in accumulate(recipe, actors, rollout, batch, members).items():
                sums[name] = sums.get(name, 0.0) + value
        norms.append(
            [
                optimizer.step(learning_rate(iteration, recipe.iterations, optimizer.options))
                for optimizer in actors.optimizers.values()
            ]
        )
        responses, tokens = responses + len(batch.members), tokens + batch.tokens
        if recipe.max_epoch_kl is not None:
            (moved,) = actors.mesh.totals([sums["update_kl"] - before])
            if moved / batch.tokens > recipe.max_epoch_kl:
                break
    totals = dict(zip(sums, actors.mesh.totals(sums.values()), strict=True))
    actions = responses if recipe.algorithm == "rloo" else tokens
    measured = {
        name: total / (tokens if name in PER_TOKEN else actions) for name, total in totals.items()
    }
    if not rollout.read:
        for found in (rollout.logprob, rollout.entropy):
            actors.mesh.sum(found)  # each rank has zeros where others have read
        rollout.read = True
        measured |= policy_measures(rollout)
    if recipe.max_epoch_kl is not None:
        measured["updates"] = len(norms)
    names = {"policy": "", "critic": "critic_"}
    for (name, optimizer), norm in zip(
        actors.optimizers.items(), np.mean(norms, axis=0), strict=True
    ):
        measured[f"{names[name]}gradient_norm"] = float(norm)
        measured |= {f"{names[name]}{k}": v for k, v in optimizer.outliers.metrics().items()}
    return measured


# The other sums are over what is clipped as one action: tokens, or whole responses.
PER_TOKEN = ("value_loss", "update_kl")


def accumulate(
    recipe: PpoRecipe, actors: Actors, rollout: Rollout, batch: MiniBatch, members: np.ndarray
) -> dict[str, float]:
    """Add the gradients of a mini-batch's responses `members` to the optimizers'; returns sums of
    losses and the like."""
    device = actors.policy.output.weight.device
    examples = [rollout.examples[i] for i in members]
    packed = pack_shared if recipe.group_size > 1 else pack
    micro = (packed(examples) if examples else filler()).to(device)
    index = torch.from_numpy(members).to(device)
    predicts = micro.targets >= 0

    found = actors.policy(
        micro.tokens,
        micro.positions,
        micro.cu_seqlens,
        micro.targets,
        keys=micro.keys,
        tails=micro.tails,
        temperature=recipe.temperature,
        entropy=not rollout.read,
    )
    if not rollout.read:
        found, entropy = found
        rows = token_rows(rollout.cu_responses, index)
        rollout.logprob[rows] = found.detach()[predicts]
        rollout.entropy[rows] = entropy.detach()[predicts]
    logprob = found[predicts]
    beta = recipe.beta * actors.adaptive.beta_factor
    loss, sums = policy_loss(recipe, rollout, logprob, index, beta, batch)
    loss.backward()
    actors.optimizer.accumulate()

    if actors.critic is not None and actors.critic_optimizer is not None:
        assert rollout.values is not None and rollout.returns is not None
        rows = token_rows(rollout.cu_responses, index)
        layout = micro.tokens, micro.positions, micro.cu_seqlens
        values = actors.critic(*layout, tails=micro.tails)[predicts]
        value_loss, _ = losses.value_clip(
            values, rollout.values[rows], rollout.returns[rows], recipe.value_clip
        )
        (recipe.value_coefficient * value_loss.sum() / batch.tokens).backward()
        actors.critic_optimizer.accumulate()
        sums["value_loss"] = float(value_loss.detach().sum())
    return sums


def policy_loss(
    recipe: PpoRecipe,
    rollout: Rollout,
    logprob: Tensor,
    members: Tensor,
    beta: float,
    batch: MiniBatch,
) -> tuple[Tensor, dict[str, float]]:
    """(what the responses `members` int64 add to their mini-batch's loss, sums for the metrics).
    `logprob` [T]: of their tokens by the policy as it is now."""
    rows = token_rows(rollout.cu_responses, members)
    lengths = rollout.cu_responses.diff()[members]
    now, old, advantage = logprob, rollout.logprob[rows], rollout.advantages[rows]
    update_kl = advantages.kl(old, logprob.detach(), "k3")
    if recipe.algorithm == "rloo":  # a response is one action
        now, old = segment_sums(now, lengths), segment_sums(old, lengths)
        advantage = rollout.advantages[rollout.cu_responses[members]]
    loss, clipped = losses.policy_clip(now, old, advantage, recipe.clip)
    if recipe.algorithm == "grpo":
        loss = loss + beta * advantages.kl(logprob, rollout.reference[rows], "k3")
    if recipe.algorithm == "rloo":
        share = loss.sum() / len(batch.members)
    else:
        share = losses.micro_batch_share(
            loss,
            lengths,
            recipe.averaged,
            tokens=batch.tokens,
            responses=len(batch.members),
            longest=recipe.sampling.max_tokens,
        )
    return share, {
        "policy_loss": float(loss.detach().sum()),
        "clip_fraction": float(clipped.sum()),
        "ratio": float((now.detach() - old).exp().sum()),
        "update_kl": float(update_kl.sum()),
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
