"""A mix of sources to pretrain on (`[[sources]]`): token shards as they lie, and text, which the
run tokenises into shards of its own; the ends that are held out; what a step says of each source.

Left out: text beyond memory, which `llama2rt corpus` makes shards of.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama2rt import atomic
from llama2rt.data import shards, tokens
from llama2rt.data.packing import Batch
from llama2rt.data.readers import Reader
from llama2rt.data.records import Document
from llama2rt.data.shard_loader import ShardLoader, SourceBatch, WeightedShards
from llama2rt.data.shards import HeldOut, Shards
from llama2rt.data.sources import WeightedSource
from llama2rt.data.tokens import TokenFile
from llama2rt.errors import InputError, naming
from llama2rt.parallel import Mesh, by_main
from llama2rt.run import Run
from llama2rt.stages.loading import file_inputs
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import Mean

if TYPE_CHECKING:
    from llama2rt.stages.pretrain import PretrainRecipe

logger = logging.getLogger("llama2rt.stages.text_sources")

VERIFIED = "verified.json"
_HELD_OUT = "held_out.bin"


def check_recipe(sources: Sequence[WeightedSource], vocab_size: int | None) -> None:
    """ValueError for sources that contradict each other or the recipe."""
    weighted = sum(source.weight is not None for source in sources)
    if weighted not in (0, len(sources)):
        raise ValueError(f"sources: {weighted} of {len(sources)} give a weight: give all or none")
    if vocab_size is not None:
        for source in sources:
            if shards.is_folder_of(source.path):
                raise ValueError(
                    f"vocab_size: {source} holds tokens already: name their tokenizer in its place"
                )


def names(sources: Sequence[WeightedSource]) -> list[str]:
    """What metrics and reports call each source: what it calls itself, or its file's name."""
    short = [source.source or source.path.stem for source in sources]
    return [
        name if short.count(name) == 1 else f"{name} ({source})"
        for name, source in zip(short, sources, strict=True)
    ]


def inputs(recipe: "PretrainRecipe") -> dict[str, Path]:
    """As `file_inputs`, with the manifest of each folder of shards in its place: the shards
    themselves are held to the hashes in it (`Shards.verify`)."""
    found = file_inputs(recipe)
    for index, source in enumerate(recipe.sources):
        if shards.is_folder_of(source.path):
            found[f"sources.{index}"] = source.path / shards.MANIFEST
    return found


def open_inputs(recipe: "PretrainRecipe", tokenizer: Tokenizer | None) -> None:
    """InputError for a source that is not there, or whose tokens another tokenizer made."""
    for index, source in enumerate(recipe.sources):
        with naming(f"sources.{index}"):
            source.require_meaning("document")
            if shards.is_folder_of(source.path):
                held = Shards(source.path)
                if tokenizer is not None:
                    held.require(tokenizer)
            elif not source.path.exists():
                raise InputError(f"{source}: no such file")


def documents(recipe: "PretrainRecipe", index: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents of a source of text. One with too little text to cut is
    trained on whole, and said."""
    source = recipe.sources[index]
    reader = Reader([source], "document", recipe.skip_invalid, recipe.document_separator)
    found = list(reader)
    reader.log()
    if recipe.held_out:
        try:
            return tokens.split(found, recipe.held_out)
        except InputError as error:
            logger.warning("%s: nothing held out: %s", source, error)
    return found, []


def training_text(recipe: "PretrainRecipe") -> list[str]:
    """Of all sources of text: what a tokenizer is trained on."""
    return [
        document.text
        for index, source in enumerate(recipe.sources)
        if not shards.is_folder_of(source.path)
        for document in documents(recipe, index)[0]
    ]


def build(recipe: "PretrainRecipe", tokenizer: Tokenizer, files: Path, index: Path) -> None:
    """Shards of each source of text below the folder `files`, and last `index`, which says where
    each source's are."""
    folders: list[str | None] = []
    for number, source in enumerate(recipe.sources):
        if shards.is_folder_of(source.path):
            folders.append(None)
            continue
        training, held_out = documents(recipe, number)
        folder = files / f"source-{number}"
        file = folder / "00000.tokens"
        tokens.build(training, tokenizer, file)
        shards.write_manifest(folder, [file], tokenizer)
        if held_out:
            tokens.build(held_out, tokenizer, folder / _HELD_OUT)
        folders.append(folder.name)
    atomic.write(index, json.dumps(folders, indent=1) + "\n")


def opened(
    recipe: "PretrainRecipe", tokenizer: Tokenizer, files: Path, index: Path
) -> tuple[list[WeightedShards], dict[str, HeldOut | TokenFile]]:
    """(what to train on, held-out ends by source). InputError where tokens are another
    tokenizer's, and where nothing could be held out although the recipe says so."""
    mix: list[WeightedShards] = []
    held_out: dict[str, HeldOut | TokenFile] = {}
    folders = json.loads(index.read_text())
    of_run = (None if name is None else files / name for name in folders)
    for name, source, own in zip(names(recipe.sources), recipe.sources, of_run, strict=True):
        held = Shards(own or source.path)
        held.require(tokenizer)
        if own is not None:
            if (own / _HELD_OUT).exists():
                held_out[name] = TokenFile(own / _HELD_OUT)
        elif recipe.held_out:
            parts = held.hold_out(recipe.held_out, tokenizer)
            if parts is None:
                logger.warning("%s: nothing held out: no document begins where it could", source)
            else:
                held, held_out[name] = parts
        mix.append(WeightedShards(name, held, source.weight))
    if recipe.held_out and not held_out:
        raise InputError(f"held_out: too little text to hold out a fraction of {recipe.held_out}")
    return mix, held_out


@by_main
def verify(recipe: "PretrainRecipe", files: Path) -> None:
    """InputError naming a shard that is not what its manifest says. One that a run has read is
    read again only where its size or time of modification is another."""
    path = files / VERIFIED
    known = json.loads(path.read_text()) if path.exists() else {}
    seen: dict[str, list[Any]] = {}
    for source in recipe.sources:
        if shards.is_folder_of(source.path):
            seen |= Shards(source.path).verify(known)
    if seen != known:
        atomic.write(path, json.dumps(seen, indent=1) + "\n")


def loader(recipe: "PretrainRecipe", mix: Sequence[WeightedShards], mesh: Mesh) -> ShardLoader:
    """The mix in the order that the recipe's seed gives it."""
    return ShardLoader(
        mix,
        recipe.context,
        recipe.batch_tokens,
        recipe.train.micro_tokens,
        recipe.seed,
        share=mesh.share,
    )


def require_repeats(recipe: "PretrainRecipe", found: ShardLoader, steps: int) -> None:
    """InputError where so many steps go through a source more often than it allows."""
    for index, (source, passes) in enumerate(zip(recipe.sources, found.passes(steps), strict=True)):
        if source.most_repeats is not None and passes > source.most_repeats * (1 + 1e-9):
            fitting = int(steps * source.most_repeats / passes)
            raise InputError(
                f"sources.{index}.most_repeats: {source}: {steps} steps go through it {passes:.3g} "
                f"times, and it allows {source.most_repeats:g}: at most {fitting} steps, or a "
                f"smaller weight"
            )


def record(run: Run, mix: Sequence[WeightedShards], found: ShardLoader, steps: int) -> None:
    """Say what goes in by source, and keep it in the manifest. Every rank calls it."""
    total = sum(found.draws)
    rows = []
    for one, draws, passes in zip(mix, found.draws, found.passes(steps), strict=True):
        rows.append(
            {
                "name": one.name,
                "path": str(one.shards.folder),
                "tokens": one.shards.tokens,
                "documents": one.shards.documents,
                "weight": one.weight,
                "share_of_windows": draws / total,
                "repeats": passes,
            }
        )
        logger.info(
            "%s: %s tokens, %.2f%% of what is read, %.3g times through it",
            one.name,
            f"{one.shards.tokens:,}",
            100 * draws / total,
            passes,
        )
    run.keep(mixture=rows)


def next_token_of(sources: Sequence[str]) -> Callable[[Any, Batch], tuple[Tensor, dict[str, Any]]]:
    """Pretraining's objective, which also says each source's loss (nats a token) and its share of
    what a step predicts."""

    def objective(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
        metrics: dict[str, Any] = {}
        for index, name in enumerate(sources):
            own = torch.zeros_like(batch.targets, dtype=torch.bool)
            if isinstance(batch, SourceBatch) and batch.sources is not None:
                own = (batch.sources == index) & (batch.targets >= 0)
            count = own.sum()
            metrics[f"loss/{name}"] = Mean(-(logprob.detach() * own).sum(), count)
            metrics[f"share/{name}"] = count
        return -logprob.sum(), metrics

    return objective


def estimate(recipe: "PretrainRecipe", tokenizer: Tokenizer | int) -> tokens.Estimated:
    """Tokens of all sources without what is held out: those of shards are counted, those of text
    estimated (`tokens.estimate`)."""
    total, how = 0.0, "exact"
    for index, source in enumerate(recipe.sources):
        if shards.is_folder_of(source.path):
            total += Shards(source.path).tokens * (1 - recipe.held_out)
        else:
            found = tokens.estimate(documents(recipe, index)[0], tokenizer)
            total += found.value
            how = found.how if found.how != "exact" else how
    return tokens.Estimated(total, how)
