"""PPO (section 3.2.3): the policy is moved towards what two reward models prefer, on a KL leash.

One iteration, its phases in order: sample, score, recompute log-probabilities, shape rewards,
estimate advantages, take one gradient step per mini-batch. Everything runs on packed response
tokens; log-probabilities are always those of the sampling temperature. An iteration's randomness is
derived from (seed, iteration) alone, so a resumed run draws what the first one would have drawn.
Before the first iteration one rollout goes to the critic's head alone (`stages.critic`).

Left out: several epochs over a rollout, shared policy and critic trunks, adaptive KL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from llama2rt import energy
from llama2rt.algorithms import advantages, losses
from llama2rt.checkpoint import native
from llama2rt.data.packing import Example, groups, pack
from llama2rt.data.records import Prompt
from llama2rt.data.sources import Source
from llama2rt.generate import Engine
from llama2rt.model import Llama, ScalarModel
from llama2rt.stages import critic, loading, phases
from llama2rt.stages.phases import RewardModels
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import diverged, interrupts
from llama2rt.train.metrics import EnergyUse
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import Change, Recipe, TrainOptions
from llama2rt.train.progress import ProgressLine
from llama2rt.train.run import Run
from llama2rt.train.schedule import learning_rate, warn_of_warmup

# What report.json says of the policy that is kept.
PICKED_BY = (
    "objective on held-out prompts: the mean over the kinds of prompts of Rc in (0, 1), divided by "
    "unit, the standard deviation of the first policy's Rc, less beta times kl_k1"
)


class PpoRecipe(Recipe):
    """Improve a policy on prompts with PPO and two reward models."""

    init: Path
    """the policy to start from: SFT, or the rejection-sampled version (V5 in the paper)"""
    reference: Path | None = None
    """pi0 of the KL penalty; None for init"""
    helpfulness: Path
    """the helpfulness reward model; the critic starts from its layers, under a head that is fitted
    to the returns of one rollout of init"""
    safety: Path | None = None
    """the safety reward model; None to go by helpfulness alone"""
    data: list[Source]
    """prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    validation: list[Source] = Field(default=[])
    """held-out prompts for early stopping, which keeps the policy with the best objective: the mean
    over the kinds of prompts of Rc in (0, 1), in standard deviations of the first policy's, less
    beta times the KL. Without them the last iteration's policy is kept"""
    tokenizer: Path | None = None
    """None for the one in init"""

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
    threshold: float = Field(default=0.15, ge=0, le=1)
    """safety score below which the safety reward rules on any prompt"""

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
    max_tokens: int = Field(default=256, gt=0)
    """response length; a longer response is cut there and scored as it stands, without an EOS"""
    max_sequences: int = Field(default=256, gt=0)
    """sampled at once"""
    cache_bytes: int | None = Field(default=None, gt=0)
    """most memory that sampling takes beside the model; None for half of what is free"""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """taken off the whitened reward (so: in standard deviations) of a cut response"""
    patience: int = Field(default=5, gt=0)
    """evaluations without a better objective before stopping"""

    seed: int = Field(default=0, ge=0)
    """of prompts' order, sampling and mini-batches"""
    # Constant lr 1e-6; AdamW 0.9 / 0.95 / 1e-5, weight decay 0.1, clip 1.0 as in pretraining. A
    # step of its checkpoint_every and validate_every is an iteration.
    train: TrainOptions = TrainOptions(
        lr=1e-6, schedule="constant", checkpoint_every=10, validate_every=10
    )

    neutral: ClassVar[tuple[str, ...]] = ("train.log_every", "train.checkpoint_every")
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
    """The four models of PPO, and what samples and trains them."""

    policy: Llama
    critic: ScalarModel
    reference: Llama
    reward_models: RewardModels
    engine: Engine
    optimizer: Optimizer
    critic_optimizer: Optimizer


def run(recipe: PpoRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train until the iterations or the patience end; returns the folder of the policy with the
    best held-out objective (of the last one where nothing is held out)."""
    files = loading.file_inputs(
        init=recipe.init,
        reference=recipe.reference,
        helpfulness=recipe.helpfulness,
        safety=recipe.safety,
        data=recipe.data,
        validation=recipe.validation,
        tokenizer=recipe.tokenizer,
    )
    run = Run.open(directory, recipe, inputs=files, resume=resume)
    if run.complete:
        return run.model_directory
    options = recipe.train
    inputs = loading.rollout_inputs(recipe)
    warn_of_warmup(recipe.iterations, options)
    prompts, held_out = inputs.prompts, inputs.held_out
    actors, tokenizer = load_actors(recipe)

    done, waited, best, unit = 0, 0, {}, None
    found = run.store.latest()
    # Step 0 is measured before the first checkpoint exists, and again if killed before it.
    run.truncate_metrics(-1 if found is None else found[0])
    if found is not None:
        done, tensors, state = found
        waited, best, unit = state["waited"], state["best"], state["unit"]
        actors.optimizer.load_state_dict(phases.unprefixed(tensors, "policy."))
        actors.critic_optimizer.load_state_dict(phases.unprefixed(tensors, "critic."))
        del tensors, found

    def validate() -> None:
        nonlocal waited, best, unit
        path = run.samples_directory / f"{done:05d}.jsonl"
        numbers = measure(recipe, actors, held_out, path, unit)
        unit = numbers["unit"]
        run.log(done, **{f"held_out/{name}": value for name, value in numbers.items()})
        waited += 1
        if not best or numbers["objective"] > best["objective"]:
            waited, best = 0, {"iteration": done, **numbers}
            native.save(actors.policy, tokenizer, run.model_directory)

    if held_out and not best:
        validate()
    if done == 0:
        run.log(0, critic_warm_up=start_critic(recipe, actors, prompts))
    with (
        ProgressLine(run.directory.resolve().name, recipe.iterations, done) as line,
        interrupts() as interrupted,
        energy.of_device(actors.policy.output.weight.device) as meter,
    ):
        use = EnergyUse(meter)
        while done < recipe.iterations and waited < recipe.patience:
            drawn = phases.draw(prompts, recipe.batch_size, recipe.seed, done)
            rollout, metrics = collect(recipe, actors, drawn, done)
            try:
                metrics |= improve(recipe, actors, rollout, done)
            except FloatingPointError as error:
                raise FloatingPointError(diverged(run, done + 1, str(error))) from None
            # A step is an iteration with its sampling and scoring; tokens are those it sampled.
            use.add(len(rollout.logprob))
            use.step()
            done += 1
            if done % options.log_every == 0 or done == recipe.iterations:
                run.log(done, **metrics, **use.read())
                line.update(done, f"reward {metrics['reward']:.3f} KL {metrics['kl_k1']:.3f}")
            due = options.validate_every and done % options.validate_every == 0
            if held_out and (due or done == recipe.iterations):
                validate()
                use.restart()
            stop = bool(interrupted) and done < recipe.iterations
            if stop or (options.checkpoint_every and done % options.checkpoint_every == 0):
                tensors = phases.prefixed(actors.optimizer.state_dict(), "policy.")
                tensors |= phases.prefixed(actors.critic_optimizer.state_dict(), "critic.")
                state = {"waited": waited, "best": best, "unit": unit}
                run.store.save(done, tensors, state)
                use.restart()
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after iteration {done} of {recipe.iterations}; saved "
                    f"{run.store.path(done)}, continue with --resume"
                )
    if not held_out:
        native.save(actors.policy, tokenizer, run.model_directory)
    picked = {"picked_by": PICKED_BY} if held_out else {}
    phases.write_report(run, {"iterations": done, **picked, **best})
    return run.model_directory


def load_actors(recipe: PpoRecipe) -> tuple[Actors, Tokenizer]:
    """Policy and critic in fp32 for their optimizers, reference and reward models frozen."""
    options = recipe.train
    policy, tokenizer = loading.load_llama(recipe.init, recipe.tokenizer)
    reference = loading.load_companion(recipe.reference or recipe.init, tokenizer, options.dtype)
    scalar = loading.load_scalar(recipe.helpfulness, tokenizer=tokenizer)
    critic_options = options.model_copy(update={"lr": recipe.critic_lr or options.lr})
    actors = Actors(
        policy=policy,
        critic=scalar,
        reference=reference.requires_grad_(False),
        reward_models=RewardModels.load(
            recipe.helpfulness, recipe.safety, recipe.threshold, options.dtype, tokenizer
        ),
        engine=phases.engine(recipe, policy, tokenizer),
        optimizer=Optimizer(policy, options),
        critic_optimizer=Optimizer(scalar.requires_grad_(True), critic_options),
    )
    return actors, tokenizer


def start_critic(recipe: PpoRecipe, actors: Actors, prompts: Sequence[Prompt]) -> float:
    """Give the critic the head that explains the returns of one rollout best; the share of them
    that it explained on responses left out."""
    drawn = phases.draw(prompts, recipe.batch_size, recipe.seed, 0)
    rollout, _ = collect(recipe, actors, drawn, "warm-up")
    weight, explained = critic.warm_up(
        actors.critic,
        rollout.examples,
        rollout.rewards,
        rollout.cu_responses,
        recipe.gamma,
        recipe.train.micro_tokens,
    )
    with torch.no_grad():
        actors.critic.head.weight.copy_(weight)
        actors.critic_optimizer.master["head.weight"].copy_(weight)
    return explained


def collect(
    recipe: PpoRecipe, actors: Actors, prompts: Sequence[Prompt], iteration: int | str
) -> tuple[Rollout, dict[str, float]]:
    """Sample one response a prompt and work out what each of its tokens was worth."""
    micro_tokens = recipe.train.micro_tokens

    # Sample.
    completions = actors.engine.generate(
        [prompt.messages for prompt in prompts],
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        seed=phases.derived_seed(recipe.seed, "rollout", iteration),
    )

    # Score: logit(Rc), read at each response's last token, whether EOS or cut.
    responses = phases.score_responses(
        completions,
        prompts,
        actors.reward_models,
        temperature=recipe.temperature,
        seed=recipe.seed,
        policy="",
        micro_tokens=micro_tokens,
    )
    device = actors.policy.output.weight.device
    reward = torch.tensor([response.reward for response in responses], device=device)
    cut = torch.tensor([not response.finished for response in responses], device=device)

    # Recompute, at the sampling temperature: log-probabilities of the policy and of pi0, values.
    examples = [phases.response_example(completion) for completion in completions]
    logprob, entropy = phases.response_logprobs(
        actors.policy, examples, recipe.temperature, micro_tokens
    )
    reference, _ = phases.response_logprobs(
        actors.reference, examples, recipe.temperature, micro_tokens
    )
    values = phases.response_values(actors.critic, examples, micro_tokens)

    # Shape: whitened over this iteration's batch (the paper names no population; a running mean
    # would make the reward depend on history), paid at the last token, the KL penalty at each.
    lengths = torch.tensor([len(completion.tokens) for completion in completions], device=device)
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
    metrics = {
        **phases.summary(responses),
        **phases.kl_per_response(logprob, reference, len(responses)),
        "entropy": float(entropy.mean()),
        "value_explained_variance": float(
            1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        ),
        # Sampler and trainer must agree on what was sampled: more than rounding here is a bug.
        "sampler_gap": float((sampled - logprob).abs().max()),
    }
    return rollout, metrics


def improve(
    recipe: PpoRecipe, actors: Actors, rollout: Rollout, iteration: int
) -> dict[str, float]:
    """One gradient step of policy and critic per mini-batch, each response used once."""
    options = recipe.train
    device = actors.policy.output.weight.device
    count = len(rollout.examples)
    order = np.random.default_rng([recipe.seed, 1, iteration]).permutation(count)
    lengths = [len(example.tokens) for example in rollout.examples]
    sums = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0}
    norms: list[tuple[float, float]] = []
    for begin in range(0, count, recipe.mini_batch_size):
        members = order[begin : begin + recipe.mini_batch_size]
        tokens = int(rollout.cu_responses.diff()[torch.from_numpy(members)].sum())
        for group in groups([lengths[i] for i in members], max(options.micro_tokens, *lengths)):
            chosen = members[group.start : group.stop]
            batch = pack([rollout.examples[i] for i in chosen]).to(device)
            rows = token_rows(rollout.cu_responses, torch.from_numpy(chosen).to(device))
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
            (
                actors.optimizer.step(learning_rate(iteration, recipe.iterations, options)),
                actors.critic_optimizer.step(
                    learning_rate(iteration, recipe.iterations, actors.critic_optimizer.options)
                ),
            )
        )
    total = len(rollout.logprob)
    gradient_norm, critic_gradient_norm = np.mean(norms, axis=0)
    return {
        **{name: value / total for name, value in sums.items()},
        "gradient_norm": float(gradient_norm),
        "critic_gradient_norm": float(critic_gradient_norm),
    }


def token_rows(cu_responses: Tensor, members: Tensor) -> Tensor:
    """int64 [sum of lengths]: places of the members' tokens among all response tokens, in order."""
    lengths = cu_responses.diff()[members]
    begins = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(cu_responses[members] - begins, lengths) + torch.arange(
        int(lengths.sum()), device=lengths.device
    )


def measure(
    recipe: PpoRecipe,
    actors: Actors,
    held_out: Sequence[Prompt],
    path: Path,
    unit: float | None = None,
) -> dict[str, float]:
    """The policy as it is now on the held-out prompts, with the same random numbers every time.

    `objective` is the paper's on what no logit can inflate: Rc in (0, 1), averaged over prompts of
    each kind and then over the kinds, divided by `unit`, the standard deviation of Rc among the
    first policy's answers (None: these are they), less beta times the KL.
    """
    numbers = phases.measure(
        path,
        actors.engine,
        actors.reference,
        actors.reward_models,
        held_out,
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        seed=phases.derived_seed(recipe.seed, "held-out"),
        policy=path.stem,
        micro_tokens=recipe.train.micro_tokens,
    )
    unit = max(numbers["score_deviation"], 1e-3) if unit is None else unit
    objective = numbers["score"] / unit - recipe.beta * numbers["kl_k1"]
    return {"objective": objective, "unit": unit, **numbers}
