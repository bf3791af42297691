"""The pairwise preference model (RLHF Workflow, arXiv 2405.07863, section 2): a chat model learns
to say which of two answers people prefer.

Fine-tuning on another kind of text: the context and both answers are one user's turn
(`rollout.pairwise`), in an order drawn from the seed, the reply is A or B, and the loss is on that
letter alone. What it says is averaged over both orders, and how far these differ is in the report.
Comparisons longer than a block are left out and counted. Left out: ratings and safety labels, which
this model has no use for; several orders of one comparison; mixes by shares (`[[sources]]`).
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from llama2rt import report
from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.loader import BlockLoader, blocks
from llama2rt.data.mixture import Account
from llama2rt.data.packing import Example, pack
from llama2rt.data.records import Comparison
from llama2rt.data.shared import pack_shared
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.evaluate import diagnostics, preference
from llama2rt.evaluate.position import position_bias
from llama2rt.model import LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.planning import Batch, Count, Model, Phase, Work
from llama2rt.rollout import pairwise
from llama2rt.rollout.pairwise import Letters
from llama2rt.run import Recipe, Run
from llama2rt.stages import adapters, mixing, spread
from llama2rt.stages.comparisons import (
    Reading,
    Unit,
    check_held_out,
    filtered,
    hold_out_of_each,
    prompt_key,
    read_units,
    to_come,
    without_prompts,
)
from llama2rt.stages.loading import Future, Opened, Outline, chat_model, file_inputs, outlines
from llama2rt.stages.pretrain import next_token
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import fit
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.preference")


class PreferenceRecipe(Recipe):
    """Train a model that reads two answers and says which of them is better."""

    init: Path
    """the chat model to start from"""
    data: list[Source]
    """comparisons of any kind"""
    validation: list[Source] = Field(default=[])
    """held-out comparisons; without them, held_out of the data"""
    held_out: int = Field(default=1000, ge=0)
    """comparisons kept back from each source in data that does not give its own number, whole
    prompts at a time, as for a reward model"""
    filters: Filters = NO_FILTERS
    """what is left out of all these files"""
    tokenizer: Path | None = None
    """None for the one in init"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""

    block_tokens: int = Field(default=3072, gt=1)
    """a block, and the longest comparison, in tokens (arXiv 2405.07863, section 2: 3072)"""
    batch_size: int = Field(default=128, gt=0)
    """blocks in an optimizer step (section 2: 128)"""
    epochs: int = Field(default=1, gt=0)
    """section 2: 1"""
    seed: int = Field(default=0, ge=0)
    """of the order of answers, the held-out draw and the blocks"""
    # Section 2: 5e-6, cosine, which ends at 0 in Hugging Face's schedule; no weight decay in the
    # authors' own settings (RLHFlow/RLHF-Reward-Modeling, pair-pm). Their warm-up of 40 steps is
    # left for the paper's other models' ratio: a short run would be nothing else.
    train: TrainOptions = TrainOptions(
        lr=5e-6, warmup_ratio=0.03, min_lr_ratio=0.0, weight_decay=0.0, micro_tokens=6144
    )
    lora: LoraOptions = LoraOptions()
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.filters.require_meaning("comparison")
        check_held_out(self.data, self.validation)
        return self


def run(recipe: PreferenceRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train, measure held-out accuracy and position bias; returns the model folder."""
    run = Run.open(directory, recipe, inputs=file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    mesh = Mesh.build(recipe.parallel, inputs.result.config, pipelined=True)
    options = recipe.train
    loader = BlockLoader(
        inputs.training,
        recipe.block_tokens,
        recipe.batch_size,
        options.micro_tokens,
        recipe.seed,
        share=mesh.share,
    )
    model = spread.from_folder(functools.partial(chat_model, recipe), recipe.init, mesh, options)

    def held_out_accuracy(model: Any) -> dict[str, float]:
        chosen = as_scores(held_out(model, inputs, options.micro_tokens, mesh))
        ratings = [comparison.rating for comparison in inputs.held_out]
        accuracy = preference.accuracy(chosen, np.zeros(len(chosen)), ratings)
        return {f"held_out/accuracy/{rating}": value for rating, value in accuracy.items()}

    fit(
        run,
        model,
        loader,
        next_token,
        options,
        steps=recipe.epochs * loader.steps_per_epoch,
        validate=held_out_accuracy if inputs.held_out and options.validate_every else None,
        mesh=mesh,
    )
    numbers: dict[str, Any] = {
        "kind": "pairwise preference",
        "trained_on": len(inputs.training),
        "left_out": inputs.left_out,
    }
    if inputs.held_out:
        numbers |= evaluate(held_out(model, inputs, options.micro_tokens, mesh), inputs.held_out)
    adapters.save(model, inputs.tokenizer, run, recipe.init)
    report.finish(run, numbers)
    return run.model_directory


@dataclass(frozen=True)
class PreferenceInputs(Opened):
    """What a run reads besides weights, and what model it will leave."""

    tokenizer: Tokenizer
    training: list[Example]
    held_out: list[Comparison]
    held_out_orders: list[list[int]]
    """tokens up to the letter, two of each held-out comparison: the chosen answer first, second"""
    left_out: Counter[str]
    result: Outline
    account: Account = field(default_factory=Account)
    """what became of every comparison of the data"""


def open_inputs(recipe: PreferenceRecipe, future: Future | None = None) -> PreferenceInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError where
    something does not fit. Of comparisons that an earlier step of a plan is still to collect
    nothing can be read: only the model is checked then."""
    recipe.lora.check()
    tokenizer, models = outlines(recipe.tokenizer, {"init": recipe.init}, future)
    config = models["init"].config
    spread.check(recipe.parallel, config, recipe.train, recipe.lora, pipelined=True)
    result = Outline(config, tokenizer)
    left_out: Counter[str] = Counter()
    if future is not None and to_come([*recipe.data, *recipe.validation], future):
        return PreferenceInputs(tokenizer, [], [], [], left_out, result)
    account = Account()
    training, aside = split(recipe, tokenizer, left_out, account)
    longest = min(recipe.block_tokens, config.context)
    orders, kept = encode(training, tokenizer, longest)
    examples = labelled(orders, Letters.of(tokenizer), recipe.seed)
    fitting = set(map(id, kept))
    account.leave_out("longer than a block", (c for c in training if id(c) not in fitting))
    account.use(kept)
    orders, held_out = encode(aside, tokenizer, longest)
    for table, found, left in (("data", training, kept), ("held out", aside, held_out)):
        if gone := len(found) - len(left):
            left_out[f"{table}: comparisons longer than {longest} tokens"] += gone
    both = [order for pair in orders for order in pair]
    return PreferenceInputs(tokenizer, examples, held_out, both, left_out, result, account)


def plan(
    recipe: PreferenceRecipe, inputs: PreferenceInputs | None, shape: Callable[[Path], LlamaConfig]
) -> Work:
    """For `--dry-run`."""
    config = shape(recipe.init)
    if inputs is None or not inputs.training:  # not read, or still to be collected
        steps, longest = None, min(recipe.block_tokens, config.context)
        batch = Batch(
            recipe.batch_size * recipe.block_tokens, longest, longest, "at most: every block full"
        )
    else:
        lengths = [len(example.tokens) for example in inputs.training]
        filled = len(blocks(lengths, recipe.block_tokens, recipe.seed))
        steps = Count(recipe.epochs * -(-filled // recipe.batch_size))
        batch = Batch.of(lengths, round(len(lengths) * min(1, recipe.batch_size / filled)))
    trained = [Model("model", config, lora=recipe.lora)]
    return Work(
        [Phase("training", trained, training=True, pipelined=True)],
        recipe.train,
        recipe.parallel,
        batch,
        steps,
        recipe.epochs,
    )


def split(
    recipe: Reading,
    tokenizer: Tokenizer,
    left_out: Counter[str],
    account: Account,
    prompts: Collection[str] = (),
) -> tuple[list[Comparison], list[Comparison]]:
    """(training, held-out) comparisons, none of whose prompts is in both, nor among the held-out
    `prompts`. What is in neither is counted in `left_out`, and `account` is told what becomes of
    each. InputError where nothing is left to train on."""
    units = []
    for i, one in enumerate(recipe.data):
        aside = recipe.held_out if one.held_out is None else one.held_out
        units.append(Unit(f"data.{i}", one, 0 if recipe.validation else aside))
    units += [Unit(f"validation.{i}", one) for i, one in enumerate(recipe.validation)]
    read = read_units(units, recipe, left_out, account)
    found = filtered(read, recipe.filters, account, tokenizer)
    if recipe.validation:
        held_out = [c for unit in units for c in found[unit.key] if unit.table == "validation"]
    else:
        held_out = hold_out_of_each(units, found, recipe.seed)
        account.leave_out("held out", held_out)
    seen = {prompt_key(comparison) for comparison in held_out} | set(prompts)
    own = [found[unit.key] for unit in units if unit.table == "data"]
    kept = without_prompts(own, seen, "data", left_out, account)
    training = [comparison for source in kept for comparison in source]
    if not training:
        raise InputError("data: the prompts of all its comparisons are held out")
    return training, held_out


def encode(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, longest: int
) -> tuple[list[tuple[list[int], list[int]]], list[Comparison]]:
    """Both orders of each comparison up to the letter, the chosen answer first, then second; and
    the comparisons that they stand for: one that is longer than `longest` in either order is left
    out, as neither answer can be cut and still be judged. InputError if none is left."""
    letters = Letters.of(tokenizer)
    orders, kept = [], []
    for comparison in comparisons:
        pair = (comparison.prompt, comparison.chosen, comparison.rejected)
        with naming(f"comparison whose prompt begins {comparison.prompt[0]['content'][:60]!r}"):
            first, second = (
                pairwise.encode(tokenizer, letters, order)
                for order in (pair, pairwise.swapped(pair))
            )
        if max(len(first), len(second)) < longest:
            orders.append((first, second))
            kept.append(comparison)
    if left_out := len(comparisons) - len(kept):
        logger.warning("%d comparisons longer than %d tokens left out", left_out, longest)
    if comparisons and not kept:
        raise InputError(
            f"block_tokens: all {len(comparisons)} comparisons are longer than {longest} tokens"
        )
    return orders, kept


def labelled(
    orders: Sequence[tuple[list[int], list[int]]], letters: Letters, seed: int
) -> list[Example]:
    """One order of each comparison, drawn from `seed`, and the letter of its chosen answer, which
    alone is learned."""
    chosen_second = np.random.default_rng([seed, 1]).integers(2, size=len(orders))
    examples = []
    for both, second in zip(orders, chosen_second.tolist(), strict=True):
        tokens = [*both[second], letters.second if second else letters.first]
        examples.append(Example.of(tokens, np.arange(len(tokens)) == len(tokens) - 1))
    return examples


def held_out(
    model: nn.Module, inputs: PreferenceInputs, micro_tokens: int, mesh: Mesh
) -> np.ndarray:
    """P(chosen is better) of the held-out comparisons, shown first and shown second: fp64 [n, 2],
    on each rank of `mesh`."""
    # A pipeline reads whole documents.
    packed = pack if mesh.degrees["pipeline"] > 1 else pack_shared
    letters = Letters.of(inputs.tokenizer)
    first = pairwise.probability_of_first(
        model, letters, inputs.held_out_orders, micro_tokens, packed, mesh
    ).reshape(-1, 2)
    return np.stack([first[:, 0], 1 - first[:, 1]], axis=1)


def as_scores(probabilities: np.ndarray) -> np.ndarray:
    """The mean of both orders as the score difference that has this Bradley-Terry probability."""
    mean = probabilities.mean(axis=1).clip(1e-12, 1 - 1e-12)
    return np.log(mean / (1 - mean))


def evaluate(probabilities: np.ndarray, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """`diagnostics.of_reward_model` of the mean of both orders, and `position_bias`."""
    chosen = as_scores(probabilities)
    return {
        **diagnostics.of_reward_model(chosen, np.zeros(len(chosen)), comparisons),
        "position_bias": position_bias(probabilities[:, 0], probabilities[:, 1]),
    }
