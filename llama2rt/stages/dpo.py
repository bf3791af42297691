"""Online iterative direct preference learning (Algorithm 1 of RLHF Workflow, arXiv 2405.07863).

Each iteration: sample n responses a prompt from the policy so far, rank them by reward, add best
against worst to the history, and run DPO on the whole history, starting from the previous
iteration's model. The reference is pi0 in every iteration. An iteration is a run of its own below
the stage's directory, with its samples, pairs, metrics and model.

Left out: offline comparisons from files, and a second agent other than another temperature.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from llama2rt.algorithms import losses, rewards
from llama2rt.checkpoint import native
from llama2rt.data.loader import PairLoader
from llama2rt.data.packing import PairBatch
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.run import Change, Recipe, Run
from llama2rt.stages import loading, phases
from llama2rt.stages.loading import RolloutInputs
from llama2rt.stages.pairs import PAIRS, REFERENCE_SUMS, Pair, Sums, kept_sums, write_pairs
from llama2rt.stages.phases import Response, RewardModels
from llama2rt.train.loop import fit
from llama2rt.train.options import TrainOptions


class DpoRecipe(Recipe):
    """Improve a policy by DPO on its own ranked samples, in iterations."""

    init: Path
    """the model the first iteration starts from, such as SFT's"""
    reference: Path | None = None
    """pi0, the reference of every iteration; None for init"""
    helpfulness: Path
    """the helpfulness reward model"""
    safety: Path | None = None
    """the safety reward model; None to go by helpfulness alone"""
    data: list[Source]
    """prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    validation: list[Source] = Field(default=[])
    """held-out prompts for the report"""
    tokenizer: Path | None = None
    """None for the one in init"""

    iterations: int = Field(default=3, gt=0)
    """T"""
    prompts_per_iteration: int = Field(default=20_000, gt=0)
    """m, or all prompts where there are fewer"""
    samples: int = Field(default=8, gt=1)
    """n: best-of-n against worst-of-n"""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0, 0.7], min_length=1)
    """of equal shares of the samples; no top-k, no top-p"""
    max_tokens: int = Field(default=2048, gt=0)
    """response length; a response that is cut there is compared as it stands, without an EOS"""
    max_sequences: int = Field(default=256, gt=0)
    """sampled at once"""
    cache_bytes: int | None = Field(default=None, gt=0)
    """most memory that sampling takes beside the model; None for half of what is free"""
    length_penalty: float = Field(default=0.0, ge=0)
    """reward taken off per character when ranking"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """safety score below which the safety reward rules on any prompt"""

    kind: losses.Kind = "dpo"
    """the preference loss, see algorithms.losses.preference; kto takes its KL from the pairs of one
    forward pass, so that train.micro_tokens is part of it"""
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
    seed: int = Field(default=0, ge=0)
    """of prompts' and pairs' order and of sampling"""
    # The paper: lr 5e-7, cosine (to 0, as its Hugging Face schedule), warm-up 0.03.
    train: TrainOptions = TrainOptions(
        lr=5e-7, warmup_ratio=0.03, min_lr_ratio=0.0, micro_tokens=16384
    )

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
        if len(set(self.temperatures)) < len(self.temperatures):
            # A sample's random numbers depend on its temperature: it would be drawn twice.
            raise ValueError(f"temperatures: expected different ones, got {self.temperatures}")
        if self.samples % len(self.temperatures):
            raise ValueError(
                f"samples: {self.samples} is no multiple of the {len(self.temperatures)} "
                "temperatures"
            )
        return self


@dataclass(frozen=True)
class Cast:
    """What all iterations work with."""

    recipe: DpoRecipe
    inputs: RolloutInputs
    reward_models: RewardModels
    reference: Callable[[], Llama]
    """pi0, loaded when first called"""
    pi0: str
    """the hash of its folder"""


@dataclass
class History:
    """All pairs so far, and pi0's sums of each (`reference_sums`)."""

    pairs: list[Pair] = field(default_factory=list)
    sums: Sums = field(default_factory=dict)

    def add(self, pairs: Sequence[Pair], sums: Sums) -> None:
        self.pairs += pairs
        for name, values in sums.items():
            self.sums[name] = np.concatenate([self.sums.get(name, np.empty(0)), values])


def run(recipe: DpoRecipe, directory: Path, *, resume: bool = False) -> Path:
    """All iterations; returns the last one's model folder."""
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
    cast = load_cast(recipe, run)
    run.truncate_metrics(0)
    history = History()
    policy_folder = recipe.init
    parents: list[Path] = []
    report: dict[str, Any] = {}
    for iteration in range(recipe.iterations):
        step = Run.open(
            directory / f"iteration-{iteration + 1}",
            # An iteration depends on those before it, not on how many are to follow.
            recipe.model_copy(update={"iterations": iteration + 1}),
            inputs={"policy": policy_folder},
            parents=parents,
            resume=True,
        )

        # Sample, and rank: best against worst joins the history, with pi0's log-probabilities.
        sampled = sample(cast, policy_folder, iteration, step)
        new = best_against_worst(sampled, recipe.length_penalty)
        if not new and not history.pairs:
            raise InputError(f"{directory}: no prompt gave two different answers to compare")
        write_pairs(step.directory / PAIRS, new)
        history.add(new, sums_of(cast, new, step))

        # Learn from the history, going on from this iteration's policy.
        if not step.complete:
            model = learn(cast, policy_folder, history, iteration, step)
            numbers: dict[str, float] = {
                "prompts": len(sampled),
                "new_pairs": len(new),
                "pairs": len(history.pairs),
            }
            numbers |= phases.summary([r for responses in sampled for r in responses])
            if cast.inputs.held_out:
                held_out = phases.measure_held_out(
                    recipe, cast.inputs, model, cast.reference(), cast.reward_models, step
                )
                numbers |= {f"held_out/{name}": value for name, value in held_out.items()}
            phases.write_report(step, numbers)
            del model
        report = step.manifest["summary"]
        run.log(iteration + 1, **report)
        policy_folder, parents = step.model_directory, [step.directory]

    final, _ = loading.load_llama(policy_folder, recipe.tokenizer)  # as saved: masters stay fp32
    native.save(final, cast.inputs.tokenizer, run.model_directory)
    phases.write_report(run, {"iterations": recipe.iterations, **report})
    return run.model_directory


def load_cast(recipe: DpoRecipe, run: Run) -> Cast:
    """Inputs, all checked, and then the models that rank."""
    inputs = loading.rollout_inputs(recipe)
    dtype = recipe.train.dtype
    reward_models = RewardModels.load(
        recipe.helpfulness, recipe.safety, recipe.threshold, dtype, inputs.tokenizer
    )

    @functools.cache
    def reference() -> Llama:
        folder = recipe.reference or recipe.init
        return loading.load_companion(folder, inputs.tokenizer, dtype).requires_grad_(False)

    pi0 = run.manifest["inputs"]["reference" if recipe.reference else "init"]["sha256"]
    return Cast(recipe, inputs, reward_models, reference, pi0)


def sample(cast: Cast, policy_folder: Path, iteration: int, step: Run) -> list[list[Response]]:
    """n scored responses of each of the iteration's prompts. The policy and its cache are gone when
    this returns, and leave their memory to the model that is trained next."""
    recipe, inputs = cast.recipe, cast.inputs
    count = min(recipe.prompts_per_iteration, len(inputs.prompts))
    policy, _ = loading.load_llama(policy_folder, recipe.tokenizer, recipe.train.dtype)
    return phases.sample(
        step.samples_directory,
        phases.engine(recipe, policy, inputs.tokenizer),
        cast.reward_models,
        phases.draw(inputs.prompts, count, recipe.seed, iteration),
        n=recipe.samples,
        temperatures=recipe.temperatures,
        max_tokens=recipe.max_tokens,
        seed=phases.derived_seed(recipe.seed, "iteration", iteration),
        policy=str(policy_folder),
        micro_tokens=recipe.train.micro_tokens,
    )


def sums_of(cast: Cast, pairs: Sequence[Pair], step: Run) -> Sums:
    """`reference_sums`, kept in the iteration's directory so that a resumed run has them."""
    recipe = cast.recipe
    if recipe.kind in losses.REFERENCE_FREE or not pairs:
        return {}
    tokens = [(response.prompt_tokens, response.tokens) for pair in pairs for response in pair]
    # The last two change how the sums are rounded.
    settings = [recipe.kind, recipe.train.precision, recipe.train.micro_tokens]
    return kept_sums(
        step.directory / REFERENCE_SUMS,
        [cast.pi0, tokens, settings],
        lambda: reference_sums(cast.reference(), pairs, recipe),
    )


def learn(cast: Cast, policy_folder: Path, history: History, iteration: int, step: Run) -> Llama:
    """The policy after `epochs` through the history, also saved as the iteration's model."""
    recipe, options = cast.recipe, cast.recipe.train
    model, _ = loading.load_llama(policy_folder, recipe.tokenizer)
    examples = [
        (phases.response_example(chosen), phases.response_example(rejected))
        for chosen, rejected in history.pairs
    ]
    # As everywhere in the RLHF stages, one that alone exceeds micro_tokens passes alone:
    # refusing it here would come after all the sampling.
    longest = max(len(a.tokens) + len(b.tokens) for a, b in examples)
    loader = PairLoader(
        examples,
        history.sums,
        recipe.batch_size,
        max(options.micro_tokens, longest),
        phases.derived_seed(recipe.seed, "order", iteration),
    )
    steps = recipe.epochs * loader.steps_per_epoch
    fit(step, model, loader, objective(recipe), options, steps=steps)
    native.save(model, cast.inputs.tokenizer, step.model_directory)
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


def reference_sums(reference: Llama, pairs: Sequence[Pair], recipe: DpoRecipe) -> Sums:
    """pi0's log-probability of both sides of each pair, fp32 [n]: summed, or averaged where the
    kind is defined on averages; nothing for kinds without a reference."""
    if recipe.kind in losses.REFERENCE_FREE or not pairs:
        return {}
    responses = [response for pair in pairs for response in pair]
    logprob, _ = phases.response_logprobs(
        reference,
        [phases.response_example(response) for response in responses],
        1.0,
        recipe.train.micro_tokens,
    )
    lengths = torch.tensor([len(response.tokens) for response in responses], device=logprob.device)
    values = phases.segment_sums(logprob, lengths)
    if recipe.kind in losses.AVERAGED:
        values = values / lengths
    chosen, rejected = values.cpu().view(-1, 2).unbind(1)
    return {"reference_chosen": chosen.numpy(), "reference_rejected": rejected.numpy()}


def objective(recipe: DpoRecipe) -> Any:
    """The chosen kind of preference loss, summed over pairs."""

    def loss(model: Llama, pairs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        batch, extras = pairs.batch, pairs.extras
        logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
        lengths = batch.cu_seqlens.diff().long()
        values = phases.segment_sums(logprob, lengths)
        if recipe.kind in losses.AVERAGED:
            values = values / phases.segment_sums((batch.targets >= 0).float(), lengths)
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
        metrics = {
            # Both are watched: in DPO the chosen log-probability often falls with the rejected.
            "chosen_logprob": chosen.detach().sum(),
            "rejected_logprob": rejected.detach().sum(),
            "margin": recipe.beta * gap.sum(),
            "accuracy": (gap > 0).sum(),
        }
        return total, metrics

    return loss
