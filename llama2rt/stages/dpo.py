"""Online iterative direct preference learning (Algorithm 1 of RLHF Workflow, arXiv 2405.07863).

Each iteration: sample n responses a prompt from the policy so far, rank them by reward, add best
against worst to the history, and run DPO on the whole history, starting from the previous
iteration's model. The reference policy is the same in every iteration. An iteration is a run of its
own below the stage's directory, with its samples, pairs, metrics and model.

Left out: offline comparisons from files, and a second agent other than another temperature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llama2rt import report
from llama2rt.algorithms import losses, rewards
from llama2rt.data.loader import PairLoader
from llama2rt.data.packing import PairBatch
from llama2rt.data.shared import packing
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.parallel import Mesh
from llama2rt.planning import Count, Model, Phase, Work
from llama2rt.rollout import balance, metrics, sampling
from llama2rt.rollout.logprobs import segment_sums
from llama2rt.rollout.responses import Response, response_example
from llama2rt.rollout.sampling import SamplingOptions, derived_seed, draw
from llama2rt.run import Change, Run
from llama2rt.stages import adapters, loading, mixing, plans
from llama2rt.stages.inputs import RolloutInputs, RolloutRecipe, open_rollout
from llama2rt.stages.pairs import PAIRS, REFERENCE_SUMS, Pair, Sums, kept_sums, write_pairs
from llama2rt.train.loop import Objective, fit
from llama2rt.train.options import TrainOptions


class DpoRecipe(RolloutRecipe):
    """Improve a policy by DPO on its own ranked samples, in iterations."""

    init: Path
    """the model the first iteration starts from, such as SFT's"""
    reference: Path | None = None
    """the reference policy of every iteration; None for init"""

    iterations: int = Field(default=3, gt=0)
    """T: how often to sample, rank and train"""
    prompts_per_iteration: int = Field(default=20_000, gt=0)
    """m, or all prompts where there are fewer"""
    samples: int = Field(default=8, gt=1)
    """n: best-of-n against worst-of-n"""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0, 0.7], min_length=1)
    """of equal shares of the samples; no top-k, no top-p"""
    sampling: SamplingOptions = SamplingOptions(max_tokens=2048)
    """length of responses, and what sampling may take; a response that is cut is compared as it
    stands, without an EOS"""
    length_penalty: float = Field(default=0.0, ge=0)
    """reward taken off per character when ranking"""

    kind: losses.Kind = "dpo"
    """the preference loss, see algorithms.losses.preference; kto takes its KL from the pairs of one
    forward pass, so that train.micro_tokens and the number of processes are part of it"""
    beta: float = Field(default=0.1, gt=0)
    """the paper's eta"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """probability that a label is wrong, for the kinds that know one (dpo, exo, robust, simpo)"""
    gamma: float = Field(default=0.0, ge=0)
    """simpo's target margin"""
    batch_size: int = Field(default=128, gt=0)
    """pairs"""
    epochs: int = Field(default=2, gt=0)
    """over the history, in each iteration"""
    share_prompts: bool | None = None
    """whether the prompt of a pair is computed once, not once a side; None for wherever that leaves
    out a tenth of a micro-batch's tokens. Losses and gradients differ by rounding"""
    # The paper: lr 5e-7, cosine (to 0, as its Hugging Face schedule), warm-up 0.03.
    train: TrainOptions = TrainOptions(
        lr=5e-7, warmup_ratio=0.03, min_lr_ratio=0.0, micro_tokens=16384
    )

    @property
    def samples_trained(self) -> bool:
        return self.iterations > 1 or bool(self.validation)

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """Further iterations follow those there are, whatever the schedule: each has its own."""
        if key == "iterations" and self.iterations > begun[key]:
            return "longer"
        return super().change(key, begun)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # The loss itself says which settings its kind does not have.
        zero = torch.zeros(1)
        losses.preference(
            zero,
            zero,
            zero,
            zero,
            kind=self.kind,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
        )
        if self.length_penalty and self.rewards.ranking == "tournament":
            raise ValueError(
                "length_penalty: a tournament's standings are no rewards: take ranking win_rate"
            )
        if len(set(self.temperatures)) < len(self.temperatures):
            # A sample's random numbers depend on its temperature: it would be drawn twice.
            raise ValueError(f"temperatures: expected different ones, got {self.temperatures}")
        if self.samples % len(self.temperatures):
            raise ValueError(
                f"samples: {self.samples} is no multiple of the {len(self.temperatures)} "
                "temperatures"
            )
        return self


@dataclass
class History:
    """All pairs so far, and the reference policy's sums of each (`reference_sums`)."""

    pairs: list[Pair] = field(default_factory=list)
    sums: Sums = field(default_factory=dict)

    def add(self, pairs: Sequence[Pair], sums: Sums) -> None:
        self.pairs += pairs
        for name, values in sums.items():
            self.sums[name] = np.concatenate([self.sums.get(name, np.empty(0)), values])


def run(recipe: DpoRecipe, directory: Path, *, resume: bool = False) -> Path:
    """All iterations; returns the last one's model folder."""
    run = Run.open(directory, recipe, inputs=loading.file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_rollout(recipe)
    mixing.record(run, inputs.account)
    mesh = Mesh.build(recipe.parallel, inputs.result.config)
    reference = run.manifest["inputs"]["reference" if recipe.reference else "init"]["sha256"]
    run.truncate_metrics(0)
    history = History()
    policy_folder = recipe.init
    parents: list[Path] = []
    numbers: dict[str, Any] = {}
    for iteration in range(recipe.iterations):
        step = Run.open(
            directory / f"iteration-{iteration + 1}",
            # An iteration depends on those before it, not on how many are to follow.
            recipe.model_copy(update={"iterations": iteration + 1}),
            inputs={"policy": policy_folder},
            parents=parents,
            resume=True,
        )

        # Sample, and rank: best against worst joins the history, with the reference's sums.
        sampled = sample(recipe, inputs, policy_folder, iteration, step)
        new = best_against_worst(sampled, recipe.length_penalty)
        if not new and not history.pairs:
            raise InputError(f"{directory}: no prompt gave two different answers to compare")
        write_pairs(step.directory / PAIRS, new)
        history.add(new, sums_of(inputs, recipe, new, reference, step))

        # Learn from the history, going on from this iteration's policy.
        if not step.complete:
            model = learn(recipe, inputs, policy_folder, history, iteration, step, mesh)
            numbers = {
                "prompts": len(sampled),
                "new_pairs": len(new),
                "pairs": len(history.pairs),
                **metrics.summary([r for responses in sampled for r in responses]),
            }
            if inputs.held_out:
                held_out = inputs.measure_held_out(model, step)
                numbers |= {f"held_out/{name}": value for name, value in held_out.items()}
            report.finish(step, numbers)
            del model
        numbers = step.manifest["summary"]
        run.log(iteration + 1, **numbers)
        policy_folder, parents = step.model_directory, [step.directory]

    final = inputs.to_train_on(policy_folder, mesh)  # as saved: masters stay fp32
    adapters.save(final, inputs.tokenizer, run, recipe.init)
    report.finish(run, {"iterations": recipe.iterations, **numbers})
    return run.model_directory


open_inputs = open_rollout


def plan(recipe: DpoRecipe, inputs: RolloutInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`: every prompt gives a pair, and the history grows by one batch of them an
    iteration."""
    policy = Model("policy", shape(recipe.init), lora=recipe.lora)
    ranking = plans.reward_models(recipe, shape)
    frozen = [*ranking, plans.reference(recipe, shape)]
    lengths = None if inputs is None else plans.prompt_lengths(inputs.prompts, inputs.tokenizer)
    prompts = min(recipe.prompts_per_iteration, len(lengths or ()) or recipe.prompts_per_iteration)
    answers = recipe.iterations * prompts * recipe.samples
    # Of one pair a prompt the reference reads both sides; of the others nothing.
    sampling = plans.sampling_of(policy, recipe.sampling, lengths, answers, ranking)
    steps = sum(
        recipe.epochs * -(-prompts * (iteration + 1) // recipe.batch_size)
        for iteration in range(recipe.iterations)
    )
    return Work(
        [
            Phase("sampling", frozen=frozen, sampling=sampling),
            Phase("training", [policy], frozen, training=True),
        ],
        recipe.train,
        recipe.parallel,
        plans.answers_batch(sampling, 2 * recipe.batch_size),
        Count(steps, "at most: every prompt gives a pair"),
        recipe.epochs,
        notes=[
            f"{recipe.iterations} iterations over {prompts:,} prompts each",
            *mixing.notes(recipe, inputs),
            *plans.comparing(recipe, recipe.samples),
        ],
    )


def sample(
    recipe: DpoRecipe, inputs: RolloutInputs, policy_folder: Path, iteration: int, step: Run
) -> list[list[Response]]:
    """n scored responses of each of the iteration's prompts. The policy and its cache are gone when
    this returns, and leave their memory to the model that is trained next; with an adapter the two
    are one model."""
    count = min(recipe.prompts_per_iteration, len(inputs.prompts))
    if recipe.lora.rank is None:
        policy = inputs.policy(policy_folder)
    else:
        policy = inputs.sampler(inputs.to_train(policy_folder), str(policy_folder))
    return sampling.sample(
        step.samples_directory,
        policy,
        draw(inputs.prompts, count, recipe.seed, iteration),
        n=recipe.samples,
        temperatures=recipe.temperatures,
        seed=derived_seed(recipe.seed, "iteration", iteration),
    )


def sums_of(
    inputs: RolloutInputs, recipe: DpoRecipe, pairs: Sequence[Pair], reference: str, step: Run
) -> Sums:
    """`reference_sums`, kept in the iteration's directory so that a resumed run has them.
    `reference`: the hash of the reference policy's folder."""
    if recipe.kind in losses.REFERENCE_FREE or not pairs:
        return {}
    tokens = [(response.prompt_tokens, response.tokens) for pair in pairs for response in pair]
    # All but the kind change how the sums are rounded.
    settings = [recipe.kind, recipe.train.precision, recipe.train.micro_tokens]
    if recipe.share_prompts is not None:
        settings.append(recipe.share_prompts)
    return kept_sums(
        step.directory / REFERENCE_SUMS,
        [reference, tokens, settings],
        lambda: reference_sums(inputs.reference, pairs, recipe),
    )


def learn(
    recipe: DpoRecipe,
    inputs: RolloutInputs,
    policy_folder: Path,
    history: History,
    iteration: int,
    step: Run,
    mesh: Mesh,
) -> Llama:
    """The policy after `epochs` through the history, also saved as the iteration's model."""
    model = inputs.to_train_on(policy_folder, mesh)
    examples = [(response_example(best), response_example(worst)) for best, worst in history.pairs]
    loader = PairLoader(
        examples,
        history.sums,
        recipe.batch_size,
        recipe.train.micro_tokens,
        derived_seed(recipe.seed, "order", iteration),
        share=mesh.share,
        packed=packing(recipe.share_prompts),
    )
    steps = recipe.epochs * loader.steps_per_epoch
    fit(step, model, loader, objective(recipe), recipe.train, steps=steps, mesh=mesh)
    adapters.save(model, inputs.tokenizer, step, recipe.init)
    return model


def best_against_worst(sampled: Sequence[Sequence[Response]], length_penalty: float) -> list[Pair]:
    """(best, worst) of each prompt by reward less the length penalty.

    A response that is only EOS is never compared: it says nothing, and a policy taught that it is
    better, or worse, than an answer learns about stopping only. Prompts whose best and worst are
    the same text, or earn the same, give no pair.
    """
    pairs = []
    for responses in sampled:
        candidates = [response for response in responses if response.text]
        if len(candidates) < 2:
            continue
        reward = rewards.length_penalty(
            torch.tensor([response.reward for response in candidates]),
            torch.tensor([len(response.text) for response in candidates]),
            length_penalty,
        )
        best, worst = candidates[int(reward.argmax())], candidates[int(reward.argmin())]
        if best.text != worst.text and float(reward.max()) > float(reward.min()):
            pairs.append((best, worst))
    return pairs


def reference_sums(reference: nn.Module, pairs: Sequence[Pair], recipe: DpoRecipe) -> Sums:
    """The reference policy's log-probability of both sides of each pair, fp32 [n]: summed, or
    averaged where the kind is defined on averages; nothing for kinds without a reference."""
    if recipe.kind in losses.REFERENCE_FREE or not pairs:
        return {}
    responses = [response for pair in pairs for response in pair]
    logprob, _ = balance.logprobs(
        reference,
        [response_example(response) for response in responses],
        1.0,
        recipe.train.micro_tokens,
        together=[i // 2 for i in range(len(responses))],
        packed=packing(recipe.share_prompts),
    )
    lengths = torch.tensor([len(response.tokens) for response in responses], device=logprob.device)
    values = segment_sums(logprob, lengths)
    if recipe.kind in losses.AVERAGED:
        values = values / lengths
    chosen, rejected = values.cpu().view(-1, 2).unbind(1)
    return {"reference_chosen": chosen.numpy(), "reference_rejected": rejected.numpy()}


def objective(recipe: DpoRecipe) -> Objective:
    """The chosen kind of preference loss, summed over pairs."""

    def loss(model: Llama, pairs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        batch, extras = pairs.batch, pairs.extras
        logprob = model(
            batch.tokens, batch.positions, batch.cu_seqlens, batch.targets, keys=batch.keys
        )
        lengths = batch.cu_seqlens.diff().long()
        values = segment_sums(logprob, lengths)
        if recipe.kind in losses.AVERAGED:
            values = values / segment_sums((batch.targets >= 0).float(), lengths)
        chosen, rejected = values.view(-1, 2).unbind(1)
        total = losses.preference(
            chosen,
            rejected,
            extras.get("reference_chosen"),
            extras.get("reference_rejected"),
            kind=recipe.kind,
            beta=recipe.beta,
            label_smoothing=recipe.label_smoothing,
            gamma=recipe.gamma,
        ).sum()
        gap = (chosen - rejected).detach()
        if recipe.kind not in losses.REFERENCE_FREE:
            gap = gap - (extras["reference_chosen"] - extras["reference_rejected"])
        sums = {
            # Both are watched: in DPO the chosen log-probability often falls with the rejected.
            "chosen_logprob": chosen.detach().sum(),
            "rejected_logprob": rejected.detach().sum(),
            "margin": recipe.beta * gap.sum(),
            "accuracy": (gap > 0).sum(),
        }
        return total, sums

    return loss
