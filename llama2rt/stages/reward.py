"""Reward modelling (section 3.2.2): a chat model's copy learns which of two answers people prefer.

Two models are trained apart, helpfulness and safety, because the two pull in opposite directions.
The head gives one number per token; a response's score is the one at its last token. What is left
out: pairwise preference models that read both answers at once (the stage preference).
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from llama2rt import report
from llama2rt.algorithms import losses, rewards
from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.loader import PairLoader
from llama2rt.data.mixture import Account
from llama2rt.data.packing import Example, PairBatch, at_ends
from llama2rt.data.records import Comparison
from llama2rt.data.shared import packing
from llama2rt.data.sources import MixSource, Source
from llama2rt.errors import InputError
from llama2rt.evaluate import diagnostics, preference
from llama2rt.model import LlamaConfig, ScalarModel
from llama2rt.model.heads import Normalization, last_token
from llama2rt.model.tails import Tails
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.planning import Batch, Count, Model, Phase, Work
from llama2rt.rollout.scoring import score_tokens
from llama2rt.run import Recipe, Run
from llama2rt.stages import adapters, mixing, spread
from llama2rt.stages.comparisons import (
    check_sources,
    encode,
    require_readable,
    split,
    to_come,
)
from llama2rt.stages.loading import (
    Future,
    Opened,
    Outline,
    file_inputs,
    load_llama,
    load_scalar,
    outline,
    outlines,
)
from llama2rt.stages.shape import ModelShape
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import Objective, fit
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.reward")


class RewardRecipe(Recipe):
    """Train a helpfulness or a safety reward model on comparisons."""

    init: Path | None = None
    """the chat model to start from; its output head is replaced (section 3.2.2)"""
    model: ModelShape = ModelShape()
    """without init: a shape to start from with random weights, to try things out"""
    context: int = Field(default=4096, gt=1)
    """without init: the longest prompt with its response, in tokens"""
    data: list[Source] = Field(default=[])
    """comparisons of this model's own kind, as which those count that do not say their kind; all of
    them are used. Those that say the other kind are left out (PKU-SafeRLHF's rows give both)"""
    mixed_in: list[Source] = Field(default=[])
    """further comparisons, drawn uniformly to make up mixed_in_share of the training set; of any
    kind, unless their table names one: {path = "pku.jsonl", kind = "helpfulness"}"""
    mixed_in_share: float | None = Field(default=None, ge=0, lt=1)
    """None for the paper's: 0.5 for helpfulness ("an equal amount"), 0.1 for safety ("90/10")"""
    sources: list[MixSource] = Field(default=[])
    """a mix in place of data and mixed_in, a [[sources]] table each: {path, format, kind, share}.
    Without a share all comparisons go in, as those of data do; with one, so many are drawn, as from
    mixed_in, as make up that share of the training set. One that holds too few is an error"""
    filters: Filters = NO_FILTERS
    """what is left out of all these files, and of validation"""
    validation: list[Source] = Field(default=[])
    """held-out comparisons of this model's kind; without them, held_out of the data"""
    held_out: int = Field(default=1000, ge=0)
    """comparisons kept back from each source in data that does not give its own number, whole
    prompts at a time ("1000 examples from each batch", section 3.2.2); likewise from sources
    without a share, or from all where each has one"""
    data_limit: int | None = Field(default=None, gt=0)
    """at most so many of the comparisons in data, of whole prompts drawn at random, which makes the
    smaller of two limits a part of the larger; None for all (Fig. 6: accuracy against data)"""
    previous: Path | None = None
    """the reward model that this one replaces: its accuracy on the held-out comparisons goes into
    the report beside the new one's, which shows how far the policy has moved away from it (section
    3.2.1)"""
    tokenizer: Path | None = None
    """None for the one in init"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""

    kind: Literal["helpfulness", "safety"] = "helpfulness"
    """which of the two models; they are trained apart"""
    margin: rewards.Scheme = "small"
    """Table 27; a large margin makes the score distribution bimodal"""
    safety_coefficient: float = Field(default=1.0, ge=0)
    """weight of the safety model's classification loss (Table 29 gives its effect, no weight)"""
    batch_size: int = Field(default=512, gt=0)
    """pairs; 1024 rows"""
    epochs: int = Field(default=1, gt=0)
    """more than one over-fits"""
    share_prompts: bool | None = None
    """whether training computes the prompt of a pair once, not once a side; None for wherever that
    leaves out a tenth of a micro-batch's tokens. Scores and gradients differ by rounding"""
    normalize: Literal["held_out", "training"] | None = None
    """the comparisons over whose responses rewards are to have mean 0 and standard deviation 1
    (Ziegler et al. 2019, section 2; the papers leave it out). Kept in the model folder for whatever
    ranks by the model; weights and scores stay as they are"""
    seed: int = Field(default=0, ge=0)
    """of the new head, the held-out draw, the mix and the pairs' order"""
    # 1e-5 for all but 70B (5e-6); cosine to 10 %; warm-up 3 % of steps, at least 5; AdamW as in
    # pretraining.
    train: TrainOptions = TrainOptions(
        lr=1e-5, warmup_ratio=0.03, warmup_minimum=5, micro_tokens=16384
    )
    lora: LoraOptions = LoraOptions()
    """beside an adapter, the head is trained whole"""
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.init is None and (self.model == ModelShape() or self.tokenizer is None):
            raise ValueError("give init, or model and tokenizer")
        if self.init is None and self.lora.rank is not None:
            raise ValueError("lora: an adapter wants a trained model below it: give init")
        if self.init is not None and self.model != ModelShape():
            raise ValueError("init brings its own shape: leave out model")
        check_sources(self)
        if self.normalize is not None and self.kind == "safety":
            raise ValueError(
                "normalize: a safety model's score says how probably a response is safe, which "
                "rewards.threshold is compared with: leave it out"
            )
        return self


def run(recipe: RewardRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train, measure held-out accuracy by rating into report.json; returns the model folder."""
    run = Run.open(directory, recipe, inputs=file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    mesh = Mesh.build(recipe.parallel, inputs.result.config)
    options = recipe.train
    loader = PairLoader(
        inputs.pairs,
        targets(inputs.comparisons, recipe),
        recipe.batch_size,
        options.micro_tokens,
        recipe.seed,
        share=mesh.share,
        packed=at_ends(packing(recipe.share_prompts)),
    )
    model = initial_model(recipe, inputs.result.config, mesh)

    def held_out_accuracy(model: Any) -> dict[str, float]:
        chosen, rejected = score(model, inputs.held_out_pairs, options.micro_tokens, mesh)
        accuracy = preference.accuracy(chosen, rejected, [c.rating for c in inputs.held_out])
        return {f"held_out/accuracy/{rating}": value for rating, value in accuracy.items()}

    fit(
        run,
        model,
        loader,
        objective(recipe),
        options,
        steps=recipe.epochs * loader.steps_per_epoch,
        validate=held_out_accuracy if inputs.held_out and options.validate_every else None,
        mesh=mesh,
    )
    numbers: dict[str, Any] = {
        "kind": recipe.kind,
        "trained_on": len(inputs.pairs),
        "left_out": inputs.left_out,
    }
    if inputs.held_out:
        scores = score(model, inputs.held_out_pairs, options.micro_tokens, mesh)
        numbers |= evaluate(*scores, inputs.held_out)
        if recipe.previous is not None:
            previous = load_scalar(recipe.previous, tokenizer=inputs.tokenizer)
            before = score(previous, inputs.held_out_pairs, options.micro_tokens, mesh)
            numbers["drift"] = drift(before, scores, inputs.held_out)
    if recipe.normalize is not None:
        over = inputs.pairs if recipe.normalize == "training" else inputs.held_out_pairs
        model.normalization = normalization(model, over, options.micro_tokens, mesh)
        numbers["normalization"] = asdict(model.normalization)
    adapters.save(model, inputs.tokenizer, run, recipe.init)
    report.finish(run, numbers)
    return run.model_directory


@dataclass(frozen=True)
class RewardInputs(Opened):
    """What a run reads besides weights, and what model it will leave."""

    tokenizer: Tokenizer
    pairs: list[tuple[Example, Example]]
    comparisons: list[Comparison]
    """what `pairs` stand for"""
    held_out_pairs: list[tuple[Example, Example]]
    held_out: list[Comparison]
    left_out: Counter[str]
    result: Outline
    account: Account = field(default_factory=Account)
    """what became of every comparison of the sources"""


def open_inputs(recipe: RewardRecipe, future: Future | None = None) -> RewardInputs:
    """All that the recipe names, read and checked before any weights are loaded, which may take
    minutes. InputError where something does not fit. Of comparisons that an earlier step of a plan
    is still to collect nothing can be read: only the models are checked then."""
    recipe.lora.check()
    config, tokenizer = shape(recipe, future)
    spread.check(recipe.parallel, config, recipe.train, recipe.lora)
    result = Outline(config, tokenizer, scalar=True)
    sources = [*recipe.data, *recipe.mixed_in, *recipe.sources, *recipe.validation]
    if future is not None and to_come(sources, future):
        return RewardInputs(tokenizer, [], [], [], [], Counter(), result)
    account = Account()
    training, held_out, left_out = split(recipe, tokenizer, config.context, account)
    if recipe.normalize == "held_out" and not held_out:
        raise InputError("normalize: there are no held-out comparisons; raise held_out")
    pairs, kept = encode(training, tokenizer, config.context)
    fitting = set(map(id, kept))
    account.leave_out("longer than the context", (c for c in training if id(c) not in fitting))
    account.use(kept)
    held_out_pairs, held_out_kept = encode(held_out, tokenizer, config.context)
    if recipe.previous is not None:
        require_readable(outline(recipe.previous, future), tokenizer, held_out_pairs)
    return RewardInputs(
        tokenizer, pairs, kept, held_out_pairs, held_out_kept, left_out, result, account
    )


def plan(
    recipe: RewardRecipe, inputs: RewardInputs | None, shape: Callable[[Path], LlamaConfig]
) -> Work:
    """For `--dry-run`."""
    if inputs is not None:
        config = inputs.result.config
    else:
        config = shape(recipe.init) if recipe.init else recipe.model.config(32000, recipe.context)
    if inputs is None or not inputs.pairs:  # not read, or still to be collected
        steps, batch = None, Batch.at_most(config.context, 2 * recipe.batch_size)
    else:
        lengths = [len(side.tokens) for pair in inputs.pairs for side in pair]
        batch = Batch.of(lengths, 2 * min(recipe.batch_size, len(inputs.pairs)))
        steps = Count(recipe.epochs * -(-len(inputs.pairs) // recipe.batch_size))
    trained = [Model("model", config, scalar=True, lora=recipe.lora)]
    phases = [Phase("training", trained, training=True)]
    notes = mixing.notes(recipe, inputs)
    return Work(phases, recipe.train, recipe.parallel, batch, steps, recipe.epochs, notes=notes)


def shape(recipe: RewardRecipe, future: Future | None = None) -> tuple[LlamaConfig, Tokenizer]:
    """What the model will be, without its weights. InputError where `init` cannot be loaded, or
    where `previous` is no reward model of the same tokenizer."""
    if recipe.init is None:
        assert recipe.tokenizer is not None  # the recipe's own check
        tokenizer = Tokenizer.load(recipe.tokenizer)
        config = recipe.model.config(tokenizer.vocab_size, recipe.context)
        if recipe.previous is not None:
            outlines(recipe.tokenizer, {"rewards.previous": recipe.previous}, future)
        return config, tokenizer
    models = {"init": recipe.init, "rewards.previous": recipe.previous}
    tokenizer, found = outlines(recipe.tokenizer, models, future)
    return found["init"].config, tokenizer


def initial_model(recipe: RewardRecipe, config: LlamaConfig, mesh: Mesh) -> ScalarModel:
    """The chat model under a regression head, to train, spread over `mesh`; without one, random
    weights."""
    init = recipe.init
    if init is None:
        return spread.from_seed(ScalarModel, config, recipe.seed, mesh, recipe.train)

    def build(device: torch.device | str) -> ScalarModel:
        dtype = recipe.lora.load_dtype(recipe.train)
        llama, _ = load_llama(init, recipe.tokenizer, dtype, device)
        model = ScalarModel.from_llama(llama, recipe.seed)
        recipe.lora.adapt(model, recipe.seed)
        return model

    return spread.from_folder(build, init, mesh, recipe.train)


def targets(comparisons: Sequence[Comparison], recipe: RewardRecipe) -> dict[str, np.ndarray]:
    """Per pair: the margin, and the two safety labels with whether they are known."""
    labels = [comparison.safety for comparison in comparisons]
    return {
        "margin": np.array([rewards.margin(c.rating, recipe.margin) for c in comparisons]),
        "labelled": np.array([label is not None for label in labels]),
        "chosen_safe": np.array([label in ("chosen_safe", "both_safe") for label in labels]),
        "rejected_safe": np.array([label == "both_safe" for label in labels]),
    }


def objective(recipe: RewardRecipe) -> Objective:
    """Ranking loss with margin and, for safety, the classification loss: sums over pairs."""

    def loss(model: ScalarModel, pairs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        batch, extras = pairs.batch, pairs.extras
        packed = batch.tokens, batch.positions, batch.cu_seqlens
        ends = Tails.of_last_tokens(batch.cu_seqlens)  # however the pairs have been packed
        values = model(*packed, keys=batch.keys, tails=ends)
        chosen, rejected = last_token(values, batch.cu_seqlens).view(-1, 2).unbind(1)
        total = losses.ranking(chosen, rejected, extras["margin"]).sum()
        metrics = {
            "accuracy": (chosen > rejected).sum(),
            "score_gap": (chosen - rejected).detach().sum(),
        }
        if recipe.kind == "safety":
            classification = losses.safety(chosen, extras["chosen_safe"]) + losses.safety(
                rejected, extras["rejected_safe"]
            )
            safety = torch.where(extras["labelled"], classification, 0).sum()
            metrics["safety_loss"] = safety.detach()
            total = total + recipe.safety_coefficient * safety
        return total, metrics

    return loss


def score(
    model: ScalarModel,
    pairs: Sequence[tuple[Example, Example]],
    micro_tokens: int,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores fp32 [n] of the chosen and of the rejected sides, on each rank of `mesh`."""
    # Side by side, so that a pair's prompt is computed once.
    sides = [side.tokens for pair in pairs for side in pair]
    scores = score_tokens(model, sides, micro_tokens=micro_tokens, mesh=mesh)
    chosen, rejected = scores.reshape(-1, 2).T
    return chosen, rejected


def normalization(
    model: ScalarModel,
    pairs: Sequence[tuple[Example, Example]],
    micro_tokens: int,
    mesh: Mesh | None = None,
) -> Normalization:
    """What gives the scores of all responses of `pairs` mean 0 and standard deviation 1."""
    scores = np.concatenate(score(model, pairs, micro_tokens, mesh))
    return Normalization.over(torch.from_numpy(scores))


def evaluate(
    chosen: np.ndarray, rejected: np.ndarray, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """`diagnostics.of_reward_model` (Table 8) and, where safety is labelled, the share of unsafe
    responses that score below 0.5 (Table 29)."""
    numbers = diagnostics.of_reward_model(chosen, rejected, comparisons)
    labels = [comparison.safety for comparison in comparisons]
    unsafe = np.concatenate(
        [
            chosen[[label == "both_unsafe" for label in labels]],
            rejected[[label in ("chosen_safe", "both_unsafe") for label in labels]],
        ]
    )
    if len(unsafe):
        numbers["unsafe_recall"] = float((unsafe < 0).mean())
    return numbers


def drift(
    before: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    """`diagnostics.drift` of the scores of the replaced model and of the new one, by the source of
    the comparisons, which is the batch where a plan has collected them."""
    sources = np.array([comparison.source or "none" for comparison in comparisons])
    scores = {}
    for source in dict.fromkeys(sources.tolist()):
        of_source = sources == source
        scores[source] = {
            when: (chosen[of_source], rejected[of_source])
            for when, (chosen, rejected) in (("before", before), ("after", after))
        }
    return diagnostics.drift(scores)
