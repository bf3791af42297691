"""`llama2rt corpus`: clean every chunk, compare all documents, write what is left, report.

A chunk that is cleaned or written is not taken again after a kill; comparing begins anew. The same
input and recipe give the same shards, byte for byte, on any number of processes.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2rt.corpus import chunks, cleaning, duplicates, output, page, workers
from llama2rt.corpus.chunks import Chunk
from llama2rt.corpus.compare import Compared
from llama2rt.corpus.contamination import EvaluationSets
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.corpus.tally import Tally
from llama2rt.corpus.workers import Workers
from llama2rt.errors import InputError
from llama2rt.parallel import world
from llama2rt.run import Run
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.corpus.job")


def run(recipe: CorpusRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Make the corpus; returns the folder of its shards."""
    open_inputs(recipe)
    for source in recipe.sources:
        if directory.resolve().is_relative_to(source.path.resolve()):
            raise InputError(f"--out: {directory} lies in the source {source.path}")
    run = Run.open(directory, recipe, inputs=inputs(recipe), resume=resume)
    leaves = directory / (output.TEXT if recipe.tokenizer is None else output.TOKENS)
    if run.complete:
        return leaves
    work = directory / output.WORK
    work.mkdir(exist_ok=True)
    parts = chunks.divide(recipe)
    sizes = [chunk.size for chunk in parts]
    with Workers(recipe, directory) as group:
        results = group.map("clean", "cleaned", parts, sizes)
        tallies = [Tally.from_json(result["tally"]) for result in results]
        _require_few_invalid(recipe, tallies)
        rich = cleaning.origins_rich_in_personal_data(recipe, results)
        compared = Compared(recipe, parts, work)
        compared.run(results, rich)
        compared.count(tallies)
        written = group.map("write", "written", compared.spans(), sizes)
    if recipe.tokenizer is not None:
        output.finish(recipe, parts, Tokenizer.load(recipe.tokenizer), directory)
    numbers = {**_summary(recipe, parts, tallies, written), "origins_removed": rich}
    run.finish(lambda manifest: page.write(directory, manifest, numbers), **_totals(numbers))
    shutil.rmtree(work)
    return leaves


def open_inputs(recipe: CorpusRecipe) -> None:
    """InputError for what the recipe names and is not there or cannot be read, before any document
    is."""
    if world().size > 1:
        raise InputError(
            f"works in one process that starts others (workers), and WORLD_SIZE is {world().size}: "
            "start it without torchrun"
        )
    for source in recipe.sources:
        chunks.files_of(source.path)
        if others := chunks.others_in(source.path):
            logger.warning(
                "%s: %d files are not read, whose names do not say that they hold text: %s ...",
                source.path,
                len(others),
                others[0].name,
            )
    if recipe.near_duplicates is not None:
        duplicates.require_datasketch()
    if recipe.tokenizer is not None:
        Tokenizer.load(recipe.tokenizer)
    if recipe.evaluation:
        sets = EvaluationSets(recipe.evaluation, recipe.ngram)
        if sets.short:
            logger.info("evaluation: %d texts are too short to be looked for", sets.short)


def inputs(recipe: CorpusRecipe) -> dict[str, Path]:
    """Every file that is read, by the key that names it."""
    found: dict[str, Path] = {}
    for index, source in enumerate(recipe.sources):
        for file in chunks.files_of(source.path):
            inside = "" if file == source.path else f"/{file.relative_to(source.path)}"
            found[f"sources.{index}{inside}"] = file
    found |= {f"evaluation.{i}": path for i, path in enumerate(recipe.evaluation)}
    return found | ({} if recipe.tokenizer is None else {"tokenizer": recipe.tokenizer})


def dry_run(recipe: CorpusRecipe) -> tuple[list[str], dict[str, Any]]:
    """(lines for people, one JSON object): what is read, in how many parts."""
    open_inputs(recipe)
    parts = chunks.divide(recipe)
    lines, rows = [], []
    for index, source in enumerate(recipe.sources):
        own = [chunk.size for chunk in parts if chunk.source == index]
        files = len(chunks.files_of(source.path))
        rows.append({"name": recipe.name(index), "bytes": sum(own), "files": files})
        lines.append(
            f"{recipe.name(index)}: {sum(own) / 1e6:,.1f} MB, {files:,} files, {len(own):,} parts "
            f"({source})"
        )
        rows[-1]["parts"] = len(own)
    count = workers.count(recipe)
    return [*lines, f"{count} processes"], {"stage": "corpus", "sources": rows, "workers": count}


def _require_few_invalid(recipe: CorpusRecipe, tallies: Sequence[Tally]) -> None:
    skipped = [message for tally in tallies for message in tally.skipped]
    if len(skipped) > recipe.skip_invalid:
        raise InputError(
            f"{skipped[recipe.skip_invalid]} (after {recipe.skip_invalid} skipped, as many as "
            "skip_invalid allows)"
        )


def _summary(
    recipe: CorpusRecipe,
    parts: Sequence[Chunk],
    tallies: Sequence[Tally],
    written: Sequence[tuple[int, int, int]],
) -> dict[str, Any]:
    """What each step did, by source."""
    sources = {recipe.name(index): Tally() for index in range(len(recipe.sources))}
    for chunk, tally, (kept, size, tokens) in zip(parts, tallies, written, strict=True):
        tally.kept, tally.kept_bytes, tally.tokens = kept, size, tokens
        sources[recipe.name(chunk.source)].update(tally)
    for name, tally in sources.items():
        for message in tally.skipped:
            logger.warning("skipped %s", message)
        if tally.keys:
            keys = ", ".join(f"{key} ({n:,})" for key, n in tally.keys.most_common())
            logger.warning("%s: keys not used: %s", name, keys)
        left = tally.read - sum(tally.removed.counts.values())
        assert left == tally.kept, f"{name}: {left} documents should be left, {tally.kept} are"
    return {"sources": {name: tally.to_json() for name, tally in sources.items()}}


def _totals(numbers: dict[str, Any]) -> dict[str, int]:
    """Of all sources: what is worth knowing at a glance."""
    rows = numbers["sources"].values()
    return {key: sum(row[key] for row in rows) for key in ("read", "kept", "kept_bytes", "tokens")}
