"""Supervised fine-tuning (section 3.1): the model learns to give the answers of dialogues.

Dialogues are laid out in the chat format and packed; the loss is on the assistant's tokens and the
EOS after them, and zero on everything the user said and on answers of weight 0. Dialogues longer
than the context are left out and counted, never cut: a cut answer teaches the model to stop short.
Left out: context distillation (section 4.2.4), which prepares dialogues and then comes here.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from llama2rt import planning, report
from llama2rt.data.loader import ExampleLoader, dealt
from llama2rt.data.packing import Batch, Example, filler, micro_batches
from llama2rt.data.readers import read
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError, naming
from llama2rt.model import LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions, on_main
from llama2rt.planning import Count, Phase, Work
from llama2rt.run import Recipe, Run
from llama2rt.stages import adapters, spread
from llama2rt.stages.loading import (
    Future,
    Opened,
    Outline,
    chat_model,
    file_inputs,
    outlines,
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
    data: list[Path]
    """dialogues (JSON lines with "messages", or a format the readers know)"""
    validation: list[Path] = Field(default=[])
    """held-out dialogues; without them, held_out of the data"""
    held_out: float = Field(default=0.01, ge=0, lt=1)
    """fraction of data, drawn from the seed, kept for the held-out loss"""
    limit: int | None = Field(default=None, gt=0)
    """use only this many dialogues, drawn from the seed"""
    tokenizer: Path | None = None
    """None for the one in init"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""

    context: int | None = Field(default=None, gt=1)
    """longest dialogue in tokens; None for the model's own (section 3.1: 4096)"""
    batch_size: int = Field(default=64, gt=0)
    """dialogues in an optimizer step (section 3.1: 64)"""
    epochs: int = Field(default=2, gt=0)
    """section 3.1: 2"""
    seed: int = Field(default=0, ge=0)
    # Section 3.1: cosine, 2e-5, decay 0.1; the rest as in pretraining.
    train: TrainOptions = TrainOptions(lr=2e-5)
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""
    lora: LoraOptions = LoraOptions()

    durations: ClassVar[tuple[str, ...]] = ("epochs",)


def run(recipe: SftRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Fine-tune and measure the held-out loss; returns the model folder."""
    run = Run.open(directory, recipe, inputs=file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mesh = Mesh.build(recipe.parallel, inputs.result.config, pipelined=True)
    options = recipe.train
    loader = ExampleLoader(
        inputs.training, recipe.batch_size, options.micro_tokens, recipe.seed, share=mesh.share
    )
    held_out = micro_batches(inputs.held_out, options.micro_tokens)
    model = spread.from_folder(functools.partial(chat_model, recipe), recipe.init, mesh, options)

    def validate(model: nn.Module) -> dict[str, float]:
        return {"held_out_loss": answer_loss(model, held_out, mesh)}

    if held_out and not on_main(run.store.steps):
        run.truncate_metrics(-1)  # a run killed before its first checkpoint has been here
        with torch.no_grad():
            run.log(0, **validate(model))
    result = fit(
        run,
        model,
        loader,
        next_token,
        options,
        steps=recipe.epochs * loader.steps_per_epoch,
        validate=validate if held_out else None,
        mesh=mesh,
    )
    adapters.save(model, inputs.tokenizer, run, recipe.init)
    report.finish(run, {**result, "dialogues": len(inputs.training)})
    return run.model_directory


@dataclass(frozen=True)
class SftInputs(Opened):
    """What a run reads besides weights, and what model it will leave."""

    tokenizer: Tokenizer
    training: list[Example]
    held_out: list[Example]
    result: Outline


def open_inputs(recipe: SftRecipe, future: Future | None = None) -> SftInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError where
    something does not fit."""
    recipe.lora.check()
    tokenizer, models = outlines(recipe.tokenizer, {"init": recipe.init}, future)
    config = models["init"].config
    spread.check(recipe.parallel, config, recipe.train, recipe.lora, pipelined=True)
    context = recipe.context or config.context
    if context > config.context:
        raise InputError(f"context: {context} exceeds the model's {config.context}")
    parts = split(recipe)
    if recipe.validation and future is None:  # else the step's own run says it
        warn_of_shared(*((dialogue.messages[:-1] for dialogue in part) for part in parts))
    training, held_out = (encode(part, tokenizer, context) for part in parts)
    return SftInputs(tokenizer, training, held_out, Outline(config, tokenizer))


def plan(recipe: SftRecipe, inputs: SftInputs | None, shape: Callable[[Path], LlamaConfig]) -> Work:
    """For `--dry-run`."""
    config = shape(recipe.init)
    if inputs is None:
        steps, batch = (
            None,
            planning.Batch.at_most(recipe.context or config.context, recipe.batch_size),
        )
    else:
        lengths = [len(example.tokens) for example in inputs.training]
        batch = planning.Batch.of(lengths, min(recipe.batch_size, len(lengths)))
        steps = Count(recipe.epochs * -(-len(lengths) // recipe.batch_size))
    trained = [planning.Model("model", config, lora=recipe.lora)]
    return Work(
        [Phase("training", trained, training=True, pipelined=True)],
        recipe.train,
        recipe.parallel,
        batch,
        steps,
        recipe.epochs,
    )


def split(recipe: Any) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held-out) dialogues of a recipe with data, validation, held_out, limit, seed and
    skip_invalid, both in the order of the files."""
    dialogues = read(recipe.data, "dialogue", recipe.skip_invalid)
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
