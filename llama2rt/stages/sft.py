"""Supervised fine-tuning (section 3.1): the model learns to give the answers of dialogues.

Dialogues are laid out in the chat format and packed; the loss is on the assistant's tokens and the
EOS after them, and zero on everything the user said and on answers of weight 0. Dialogues longer
than the context are left out and counted, never cut: a cut answer teaches the model to stop short.
Left out: Ghost Attention and context distillation (section 3.3, 4.2.4), which make dialogues of
their own.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from llama2rt import planning, report
from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.loader import WHOLE, BlockLoader, ExampleLoader, Share, blocks, dealt
from llama2rt.data.mixture import Account, draw
from llama2rt.data.packing import Batch, Example, filler, micro_batches
from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Dialogue
from llama2rt.data.sources import MixSource
from llama2rt.errors import InputError, naming
from llama2rt.model import LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions, on_main
from llama2rt.planning import Count, Phase, Work
from llama2rt.run import Recipe, Run
from llama2rt.stages import adapters, mixing, spread
from llama2rt.stages import dialogues as mix
from llama2rt.stages.loading import (
    Future,
    Opened,
    Outline,
    chat_model,
    file_inputs,
    outlines,
    readable,
    warn_of_shared,
)
from llama2rt.stages.pretrain import next_token
from llama2rt.text.chat import encode_dialogue
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import fit
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.sft")


class SftRecipe(Recipe):
    """Fine-tune a language model on dialogues; the loss is on the answers only."""

    init: Path
    """the model folder to start from"""
    data: list[Path] = Field(default=[])
    """dialogues (JSON lines with "messages", or a format the readers know)"""
    sources: list[MixSource] = Field(default=[])
    """a mix in place of data, a [[sources]] table each: {path, format, share, pool}. Without a
    share all dialogues go in; with one, so many are drawn as make up that share of the training
    set. One that holds too few is an error"""
    filters: Filters = NO_FILTERS
    """what is left out of all these files, and of validation"""
    validation: list[Path] = Field(default=[])
    """held-out dialogues; without them, held_out of the data"""
    held_out: float = Field(default=0.01, ge=0, lt=1)
    """fraction of data, drawn from the seed, kept for the held-out loss"""
    shares: list[Annotated[float, Field(ge=0, le=1)]] = Field(default=[])
    """the fraction of each file of data to use, drawn from the seed; none for all. A larger one
    holds what a smaller one draws"""
    limit: int | None = Field(default=None, gt=0)
    """use only this many dialogues, drawn from the seed"""
    tokenizer: Path | None = None
    """None for the one in init"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""

    context: int | None = Field(default=None, gt=1)
    """longest dialogue in tokens; None for the model's own (section 3.1: 4096)"""
    block_tokens: int | None = Field(default=None, gt=1)
    """fill blocks of so many tokens with dialogues, which do not see each other, as full as best
    fit can (section 3.1: 4096, concatenated until filled; the online recipe: 8192); None for a
    dialogue each"""
    batch_size: int = Field(default=64, gt=0)
    """dialogues, or blocks, in an optimizer step (section 3.1: 64)"""
    epochs: int = Field(default=2, gt=0)
    """section 3.1: 2"""
    seed: int = Field(default=0, ge=0)
    # Section 3.1: cosine, 2e-5, decay 0.1; the rest as in pretraining.
    train: TrainOptions = TrainOptions(lr=2e-5)
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""
    lora: LoraOptions = LoraOptions()

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shares and (self.sources or self.filters != NO_FILTERS):
            raise ValueError("shares: of plain data; in a mix a source says its share of the whole")
        if self.shares and len(self.shares) != len(self.data):
            raise ValueError(
                f"shares: expected one for each of the {len(self.data)} files of data, got "
                f"{len(self.shares)}"
            )
        mix.check_recipe(self)
        return self


def run(recipe: SftRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Fine-tune and measure the held-out loss; returns the model folder."""
    run = Run.open(directory, recipe, inputs=file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    mesh = Mesh.build(recipe.parallel, inputs.result.config, pipelined=True)
    options = recipe.train
    loader = loader_of(recipe, inputs.training, mesh.share)
    held_out = micro_batches(inputs.held_out, options.micro_tokens)
    model = spread.from_folder(functools.partial(chat_model, recipe), recipe.init, mesh, options)
    steps = recipe.epochs * loader.steps_per_epoch
    result = fit_measured(run, model, loader, held_out, options, steps, mesh)
    adapters.save(model, inputs.tokenizer, run, recipe.init)
    report.finish(run, {**result, "dialogues": len(inputs.training)})
    return run.model_directory


def fit_measured(
    run: Run,
    model: nn.Module,
    loader: ExampleLoader | BlockLoader,
    held_out: Sequence[Batch],
    options: TrainOptions,
    steps: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """`fit` on next tokens, with the loss on the answers of `held_out` before, while and after;
    without any where it is empty. What `fit` returns."""

    def validate(model: nn.Module) -> dict[str, float]:
        return {"held_out_loss": answer_loss(model, held_out, mesh)}

    if held_out and not on_main(run.store.steps):
        run.truncate_metrics(-1)  # a run killed before its first checkpoint has been here
        with torch.no_grad():
            run.log(0, **validate(model))
    return fit(
        run,
        model,
        loader,
        next_token,
        options,
        steps=steps,
        validate=validate if held_out else None,
        mesh=mesh,
    )


@dataclass(frozen=True)
class SftInputs(Opened):
    """What a run reads besides weights, and what model it will leave."""

    tokenizer: Tokenizer
    training: list[Example]
    held_out: list[Example]
    result: Outline
    account: Account = field(default_factory=Account)
    """what became of every dialogue of a mix; empty of plain data"""


def open_inputs(recipe: SftRecipe, future: Future | None = None) -> SftInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError where
    something does not fit. Of dialogues that an earlier step of a plan is still to leave nothing
    can be read: only the model is checked then."""
    recipe.lora.check()
    tokenizer, models = outlines(recipe.tokenizer, {"init": recipe.init}, future)
    config = models["init"].config
    spread.check(recipe.parallel, config, recipe.train, recipe.lora, pipelined=True)
    context = recipe.context or config.context
    if context > config.context:
        raise InputError(f"context: {context} exceeds the model's {config.context}")
    if recipe.block_tokens is not None and recipe.block_tokens < context:
        raise InputError(
            f"block_tokens: {recipe.block_tokens} has no room for a dialogue of context, {context}"
        )
    named = [*recipe.data, *(source.path for source in recipe.sources), *recipe.validation]
    if len(readable(named, future)) < len(named):
        return SftInputs(tokenizer, [], [], Outline(config, tokenizer))
    account = Account()
    if recipe.sources or recipe.filters != NO_FILTERS:
        parts = mix.split(recipe, tokenizer, context, account)
    else:
        parts = split(recipe)
    if recipe.validation and future is None:  # else the step's own run says it
        warn_of_shared(*((dialogue.messages[:-1] for dialogue in part) for part in parts))
    training, held_out = (encode(part, tokenizer, context) for part in parts)
    if account.ingredients:
        account.use(parts[0])
    return SftInputs(tokenizer, training, held_out, Outline(config, tokenizer), account)


def loader_of(
    recipe: SftRecipe, training: Sequence[Example], share: Share = WHOLE
) -> ExampleLoader | BlockLoader:
    """Steps of dialogues, or of full blocks of them."""
    size, micro_tokens, seed = recipe.batch_size, recipe.train.micro_tokens, recipe.seed
    if recipe.block_tokens is None:
        return ExampleLoader(training, size, micro_tokens, seed, share=share)
    return BlockLoader(
        training, recipe.block_tokens, size, micro_tokens, seed, share=share, full=True
    )


def plan(recipe: SftRecipe, inputs: SftInputs | None, shape: Callable[[Path], LlamaConfig]) -> Work:
    """For `--dry-run`."""
    config = shape(recipe.init)
    if inputs is None or not inputs.training:  # not read, or still to be made
        steps, longest = None, recipe.context or config.context
        batch = planning.Batch.at_most(longest, recipe.batch_size)
        if recipe.block_tokens is not None:
            tokens = recipe.batch_size * recipe.block_tokens
            batch = planning.Batch(tokens, longest, longest, "at most: every block full")
    else:
        lengths = [len(example.tokens) for example in inputs.training]
        items = len(lengths)
        if recipe.block_tokens is not None:
            items = len(blocks(lengths, recipe.block_tokens, recipe.seed, full=True))
        a_step = round(len(lengths) * min(1, recipe.batch_size / items))
        batch = planning.Batch.of(lengths, a_step)
        steps = Count(recipe.epochs * -(-items // recipe.batch_size))
    trained = [planning.Model("model", config, lora=recipe.lora)]
    return Work(
        [Phase("training", trained, training=True, pipelined=True)],
        recipe.train,
        recipe.parallel,
        batch,
        steps,
        recipe.epochs,
        notes=mixing.notes(recipe, inputs),
    )


def split(recipe: SftRecipe) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held-out) dialogues, both in the order of the files."""
    return divide(recipe, _read(recipe))


class Divided(Protocol):
    """A recipe that says which dialogues are held out."""

    @property
    def validation(self) -> list[Path]: ...
    @property
    def held_out(self) -> float: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def skip_invalid(self) -> int: ...
    @property
    def seed(self) -> int: ...


def divide(recipe: Divided, dialogues: Sequence[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held-out) of these dialogues, in their order."""
    order = np.random.default_rng(recipe.seed).permutation(len(dialogues))[: recipe.limit]
    if recipe.validation:
        training = [dialogues[i] for i in np.sort(order)]
        held_out = read(recipe.validation, "dialogue", recipe.skip_invalid)
        return training, held_out
    count = round(recipe.held_out * len(order))
    if count == len(order):
        raise InputError(f"held_out: {count} of {len(order)} dialogues leaves none to train on")
    kept, aside = np.sort(order[count:]), np.sort(order[:count])
    return [dialogues[i] for i in kept], [dialogues[i] for i in aside]


def _read(recipe: SftRecipe) -> list[Dialogue]:
    """All dialogues, or the shares of them."""
    if not recipe.shares:
        return read(recipe.data, "dialogue", recipe.skip_invalid)
    reader = Reader(recipe.data, "dialogue", recipe.skip_invalid)
    found: list[Dialogue] = []
    for index, (own, share) in enumerate(zip(reader.by_file(), recipe.shares, strict=True)):
        count = round(share * len(own))
        if share and not count:
            raise InputError(f"shares: {share:g} of {recipe.data[index]}, {len(own)}, is none")
        found += [own[i] for i in draw(len(own), count, recipe.seed, index)]
    reader.log()
    if not found:
        raise InputError("shares: leave no dialogue")
    return found


def encode(dialogues: Sequence[Dialogue], tokenizer: Tokenizer, context: int) -> list[Example]:
    """Tokens and loss mask of each dialogue that fits `context`; InputError if none does."""
    examples = []
    for dialogue in dialogues:
        with naming(f"dialogue that begins {dialogue.messages[0]['content'][:60]!r}"):
            tokens = encode_dialogue(tokenizer, dialogue.messages, dialogue.learned)
            examples.append(Example.of(*tokens))
    fitting = [example for example in examples if len(example.tokens) <= context]
    if len(fitting) < len(examples):
        left_out = len(examples) - len(fitting)
        logger.warning("%d dialogues longer than the context of %d left out", left_out, context)
    if examples and not fitting:
        raise InputError(f"context: all {len(examples)} dialogues are longer than {context} tokens")
    return fitting


def answer_loss(model: nn.Module, batches: Sequence[Batch], mesh: Mesh | None = None) -> float:
    """Nats per answer token over `batches`, of which the ranks of `mesh` read a share each."""
    mesh = mesh or Mesh.single()
    device = next(model.parameters()).device
    own = dealt(batches, mesh.share, filler())
    nats = sum(float(next_token(model, batch.to(device))[0]) for batch in own)
    (total,) = mesh.totals([nats])
    return total / sum(batch.weight for batch in batches)
