"""Pretraining (section 2): next-token prediction on plain text, from random or given weights.

Text becomes one memory-mapped token stream, documents apart by BOS and EOS; a step takes random
windows of it. The last part of each source is held out, and its loss is also given in bits per byte
of UTF-8, which compares across tokenizers, by source and over all. With `[[sources]]` it is a mix
by weight, of text or of token shards (`text_sources`).
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llama2rt import planning, report
from llama2rt.data import tokens
from llama2rt.data.loader import dealt
from llama2rt.data.packing import Batch, filler
from llama2rt.data.shard_loader import ShardLoader
from llama2rt.data.shards import HeldOut
from llama2rt.data.sources import WeightedSource
from llama2rt.data.token_loader import TokenLoader
from llama2rt.data.tokens import TokenFile, TokenStream
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions, by_main
from llama2rt.parallel.saving import save_model
from llama2rt.planning import Count, Model, Phase, Work
from llama2rt.run import Recipe, Run
from llama2rt.stages import corpus, spread, text_sources
from llama2rt.stages.loading import (
    Future,
    Opened,
    Outline,
    load_llama,
    outline,
    outlines,
)
from llama2rt.stages.shape import ModelShape
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import Objective, fit
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.pretrain")


class PretrainRecipe(Recipe):
    """Pretrain a model on text (or go on with one: init)."""

    data: list[Path] = Field(default=[])
    """text files or JSON lines with "text", all of which go in once an epoch"""
    sources: list[WeightedSource] = Field(default=[])
    """a mix in place of data, a [[sources]] table each: {path, weight, most_repeats, source}; path
    is text, or a folder of token shards that `llama2rt corpus` left"""
    document_separator: str | None = None
    """cuts .txt files into documents; None: each file is one"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""
    held_out: float = Field(default=0.01, ge=0, lt=1)
    """last fraction of each source, by bytes, kept for the held-out loss; a source is a file, or in
    a file whose documents name theirs, all that name the same. Of token shards by tokens, and whole
    documents"""

    init: Path | None = None
    """a model folder to continue from, with its shape and its tokenizer"""
    model: ModelShape = ModelShape()
    """the shape to start from with random weights; not with init"""
    tokenizer: Path | None = None
    """tokenizer.model, tokenizer.json or a folder with one"""
    vocab_size: int | None = Field(default=None, gt=0)
    """without tokenizer: train one of this size on the training text"""

    context: int = Field(default=4096, gt=1)
    """tokens in a window (Table 1: 4k)"""
    batch_tokens: int = Field(default=4_194_304, gt=0)
    """tokens in an optimizer step (Table 1: 4M)"""
    steps: int | None = Field(default=None, gt=0)
    """optimizer steps; or say epochs"""
    epochs: float | None = Field(default=None, gt=0)
    """times through the training text; or say steps"""
    seed: int = Field(default=0, ge=0)
    # Section 2.2: AdamW 0.9 / 0.95 / 1e-5, decay 0.1, clip 1.0, cosine to 10 %, warm-up 2000.
    train: TrainOptions = TrainOptions(lr=3e-4, warmup_steps=2000)
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""

    durations: ClassVar[tuple[str, ...]] = ("steps", "epochs")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.data) == bool(self.sources):
            raise ValueError("give data, or sources in its place")
        text_sources.check_recipe(self.sources, self.vocab_size)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.init is not None:
            if self.model != ModelShape() or self.vocab_size is not None:
                raise ValueError("init brings its model and tokenizer: leave out model, vocab_size")
        elif (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give exactly one of tokenizer and vocab_size")
        for name, tokens_held in (
            ("batch_tokens", self.batch_tokens),
            ("train.micro_tokens", self.train.micro_tokens),
        ):
            if tokens_held < self.context:
                raise ValueError(
                    f"{name}: {tokens_held} cannot hold one window of context {self.context}"
                )
        return self


def run(recipe: PretrainRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Tokenise, train, measure the held-out loss; returns the model folder."""
    # What is impossible is said before hours of tokenising; the vocabulary plays no part.
    if recipe.init is None:
        shape = recipe.model.config(recipe.vocab_size or 32000, recipe.context)
    else:
        shape = outline(recipe.init).config
    check(recipe, shape)
    if recipe.sources:
        open_inputs(recipe)
    mesh = Mesh.build(recipe.parallel, shape, pipelined=True)
    run = Run.open(directory, recipe, inputs=text_sources.inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory

    prepared = prepare(recipe, run, mesh)
    options, loader, held_out = recipe.train, prepared.loader, prepared.held_out
    model = initial_model(recipe, prepared.tokenizer, mesh)

    def validate(model: nn.Module) -> dict[str, float]:
        return held_out_losses(model, held_out, recipe.context, options.micro_tokens, mesh)

    result = fit(
        run,
        model,
        loader,
        prepared.objective or next_token,
        options,
        steps=prepared.steps,
        validate=validate if held_out else None,
        mesh=mesh,
    )
    save_model(model, prepared.tokenizer, run.model_directory)
    report.finish(run, result)
    return run.model_directory


@dataclass(frozen=True)
class PretrainInputs(Opened):
    """What model a run will leave."""

    result: Outline


def open_inputs(recipe: PretrainRecipe, future: Future | None = None) -> PretrainInputs:
    """What can be known before the text is tokenised: the model's shape, and that all files are
    there. InputError where something does not fit, and in a plan (`future`) where the tokenizer is
    still to be trained: nothing after this step could be checked."""
    for path in recipe.data:
        if not path.exists():
            raise InputError(f"{path}: no such file")
    tokenizer: Tokenizer | None = None
    if recipe.init is not None:
        tokenizer, models = outlines(recipe.tokenizer, {"init": recipe.init}, future)
        config = models["init"].config
    elif recipe.tokenizer is not None:
        tokenizer = Tokenizer.load(recipe.tokenizer)
        config = recipe.model.config(tokenizer.vocab_size, recipe.context)
    elif recipe.vocab_size is not None and future is None:
        config = recipe.model.config(recipe.vocab_size, recipe.context)
    else:
        raise InputError("tokenizer: a plan needs it before its first step; train it first")
    check(recipe, config)
    text_sources.open_inputs(recipe, tokenizer)
    return PretrainInputs(Outline(config, tokenizer))


def plan(
    recipe: PretrainRecipe, inputs: PretrainInputs | None, shape: Callable[[Path], LlamaConfig]
) -> Work:
    """For `--dry-run`. With `inputs` the text is read and divided as a run would; where the recipe
    says epochs, steps are those of a sample's tokens a byte."""
    if inputs is not None:
        config = inputs.result.config
    elif recipe.init is not None:
        config = shape(recipe.init)
    else:  # with the preset's vocabulary, since no tokenizer is read
        preset = LlamaConfig.preset(recipe.model.preset or "llama2-7b")
        config = recipe.model.config(recipe.vocab_size or preset.vocab_size, recipe.context)
    _require_context(recipe, config)
    windows = recipe.batch_tokens // recipe.context
    steps = None if recipe.steps is None else Count(recipe.steps)
    epochs, notes = recipe.epochs, []
    if inputs is not None:
        counted = inputs.result.tokenizer or recipe.vocab_size or 0
        if recipe.sources:
            held = text_sources.estimate(recipe, counted)
        else:
            held = tokens.estimate(corpus.divide(recipe)[0], counted)
        notes.append(f"the training text is {held.value:,.0f} tokens ({held.how})")
        per_epoch = math.ceil(math.ceil((held.value - 1) / recipe.context) / windows)
        if steps is None:
            steps = Count(max(1, round((recipe.epochs or 0) * per_epoch)), held.how)
        epochs = recipe.epochs or round(steps.value / per_epoch, 3)
    return Work(
        [Phase("training", [Model("model", config)], training=True, pipelined=True)],
        recipe.train,
        recipe.parallel,
        planning.Batch(windows * recipe.context, recipe.context, recipe.context),
        steps,
        epochs,
        notes=notes,
    )


@dataclass(frozen=True)
class Prepared:
    """What is trained on, and what is measured on."""

    loader: TokenLoader | ShardLoader
    steps: int
    held_out: Mapping[str, TokenStream | HeldOut]
    """by source"""
    tokenizer: Tokenizer
    objective: Objective | None = None
    """what says each source's loss; None for `next_token`"""


def prepare(recipe: PretrainRecipe, run: Run, mesh: Mesh) -> Prepared:
    """The streams of tokens, each built once and kept in the run's directory for when it is
    resumed. InputError where a source's shards have changed since then."""
    files = run.directory / "tokens"
    # Written last: the streams it names are complete.
    index = files / ("sources.json" if recipe.sources else "held_out.json")
    text_sources.verify(recipe, files)
    tokenise(recipe, files, index)

    if recipe.init is not None:
        tokenizer, _ = outlines(recipe.tokenizer, {"init": recipe.init})
    else:
        tokenizer = Tokenizer.load(recipe.tokenizer or files / TRAINED)
    if recipe.sources:
        mix, ends = text_sources.opened(recipe, tokenizer, files, index)
        mixed = text_sources.loader(recipe, mix, mesh)
        steps = steps_of(recipe, mixed)
        text_sources.require_repeats(recipe, mixed, steps)
        text_sources.record(run, mix, mixed, steps)
        objective = text_sources.next_token_of([one.name for one in mix])
        return Prepared(mixed, steps, ends, tokenizer, objective)
    stream = TokenFile(files / "training.bin")
    held_out = {
        name: TokenFile(files / file) for name, file in json.loads(index.read_text()).items()
    }
    for file in (stream, *held_out.values()):
        file.require(tokenizer)
    loader = TokenLoader(
        stream,
        recipe.context,
        recipe.batch_tokens,
        recipe.train.micro_tokens,
        recipe.seed,
        share=mesh.share,
    )
    return Prepared(loader, steps_of(recipe, loader), held_out, tokenizer)


def steps_of(recipe: PretrainRecipe, loader: TokenLoader | ShardLoader) -> int:
    """Optimizer steps of the whole run."""
    return recipe.steps or max(1, round((recipe.epochs or 0) * loader.steps_per_epoch))


def initial_model(recipe: PretrainRecipe, tokenizer: Tokenizer, mesh: Mesh) -> Llama:
    """The model to train, spread over `mesh`: `init`, or random weights."""
    init = recipe.init
    if init is None:
        config = recipe.model.config(tokenizer.vocab_size, recipe.context)
        return spread.from_seed(Llama, config, recipe.seed, mesh, recipe.train)

    def build(device: torch.device | str) -> Llama:
        return load_llama(init, recipe.tokenizer, device=device)[0]

    return spread.from_folder(build, init, mesh, recipe.train)


# The tokenizer that is trained on the text. The digest inside the token files ties them to it;
# training it is deterministic, so one lost to a kill comes out the same.
TRAINED = "tokenizer.model"


@by_main
def tokenise(recipe: PretrainRecipe, files: Path, index: Path) -> None:
    """The streams in the folder `files`, the tokenizer too where the recipe names none, and last
    `index`; nothing where it is there."""
    if index.exists():
        return
    texts = None if recipe.sources else corpus.divide(recipe)
    if recipe.init is not None:
        tokenizer, models = outlines(recipe.tokenizer, {"init": recipe.init})
        _require_context(recipe, models["init"].config)
    elif recipe.tokenizer is not None:
        tokenizer = Tokenizer.load(recipe.tokenizer)
    else:
        assert recipe.vocab_size is not None  # the recipe's own check
        training = (
            text_sources.training_text(recipe)
            if texts is None
            else [document.text for document in texts[0]]
        )
        tokenizer = Tokenizer.train(training, recipe.vocab_size, files / TRAINED)
    if texts is None:
        text_sources.build(recipe, tokenizer, files, index)
    else:
        corpus.build(texts, tokenizer, files, index)


def check(recipe: PretrainRecipe, config: LlamaConfig) -> None:
    """InputError where a model of this shape cannot be trained as the recipe says."""
    spread.check(recipe.parallel, config, recipe.train, pipelined=True)
    _require_context(recipe, config)


def _require_context(recipe: PretrainRecipe, config: LlamaConfig) -> None:
    if recipe.context > config.context:
        raise InputError(f"context: {recipe.context} exceeds the model's {config.context}")


def next_token(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats summed over all targets: every token of a window, or, in fine-tuning,
    those of the answers."""
    packed = batch.tokens, batch.positions, batch.cu_seqlens, batch.targets
    logprob = model(*packed, tails=batch.tails)
    return -logprob.sum(), {}


def held_out_losses(
    model: nn.Module,
    streams: Mapping[str, TokenStream | HeldOut],
    context: int,
    micro_tokens: int,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Nats per token and bits per UTF-8 byte over the whole of all `streams`, EOS included, in
    windows of `context` tokens that do not see each other; of several streams also each one's
    bits per byte, by name. The ranks of `mesh` read a share each."""
    mesh = mesh or Mesh.single()
    device = next(model.parameters()).device
    nats = dict.fromkeys(streams, 0.0)
    count = 0
    for name, stream in streams.items():
        for batch in dealt(stream.batches(context, micro_tokens), mesh.share, filler()):
            loss, _ = next_token(model, batch.to(device))
            nats[name], count = nats[name] + loss.item(), count + batch.weight
    *summed, predicted = mesh.totals([*nats.values(), count])
    nats = dict(zip(streams, summed, strict=True))
    size = {name: stream.text_bytes for name, stream in streams.items()}
    each = {f"bits_per_byte/{name}": nats[name] / math.log(2) / size[name] for name in streams}
    return {
        "held_out_loss": sum(nats.values()) / predicted,
        "bits_per_byte": sum(nats.values()) / math.log(2) / sum(size.values()),
        **(each if len(streams) > 1 else {}),
    }
