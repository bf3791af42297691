"""The text that a model is pretrained on: read by source, its ends held out, laid out as tokens."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from llama2rt import atomic
from llama2rt.data import tokens
from llama2rt.data.readers import Reader
from llama2rt.data.records import Document
from llama2rt.errors import InputError
from llama2rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama2rt.stages.pretrain import PretrainRecipe

logger = logging.getLogger("llama2rt.stages.corpus")

# A file whose documents name more sources than this names something else (the page of each).
MOST_SOURCES = 64


def build(
    texts: tuple[list[Document], dict[str, list[Document]]],
    tokenizer: Tokenizer,
    folder: Path,
    index: Path,
) -> None:
    """The streams of `divide`'s two parts in `folder`, and `index`, which names them."""
    training, held_out = texts
    tokens.build(training, tokenizer, folder / "training.bin")
    names = {
        name: "held_out.bin" if len(held_out) == 1 else f"held_out.{i}.bin"
        for i, name in enumerate(held_out)
    }
    for name, documents in held_out.items():
        tokens.build(documents, tokenizer, folder / names[name])
    atomic.write(index, json.dumps(names, indent=2) + "\n")


def divide(recipe: "PretrainRecipe") -> tuple[list[Document], dict[str, list[Document]]]:
    """(training documents, held-out documents by source): the end of each source is held out, so
    that the loss is not that of the last file alone. A source with too little text to cut is
    trained on whole, and said. InputError where none can be cut."""
    training: list[Document] = []
    held_out: dict[str, list[Document]] = {}
    for name, documents in by_source(recipe).items():
        if not recipe.held_out:
            training += documents
            continue
        try:
            first, last = tokens.split(documents, recipe.held_out)
        except InputError as error:
            logger.warning("%s: nothing held out: %s", name, error)
            training += documents
        else:
            training += first
            held_out[name] = last
    if recipe.held_out and not held_out:
        raise InputError(f"held_out: too little text to hold out a fraction of {recipe.held_out}")
    return training, held_out


def by_source(recipe: "PretrainRecipe") -> dict[str, list[Document]]:
    """All documents by source, in the order of the files."""
    reader = Reader(recipe.data, "document", recipe.skip_invalid, recipe.document_separator)
    files = reader.by_file()
    reader.log()
    names = [path.name for path in recipe.data]
    found: dict[str, list[Document]] = {}
    for path, documents in zip(recipe.data, files, strict=True):
        file = path.name if names.count(path.name) == 1 else str(path)
        named = list(dict.fromkeys(document.source for document in documents))
        one = len(named) == 1 or len(named) > MOST_SOURCES
        for document in documents:
            name = file if one or not document.source else f"{file}: {document.source}"
            found.setdefault(name, []).append(document)
    return found
