"""What becomes of a chunk: a shard of text, and one of tokens, of the documents that are left."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama2rt import atomic
from llama2rt.corpus.chunks import Chunk
from llama2rt.corpus.cleaning import documents
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.data import shards, tokens
from llama2rt.data.tokens import TokenFile
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.text.words import WordEncoder

TEXT, TOKENS, WORK = "text", "tokens", "work"


def text_shard(recipe: CorpusRecipe, chunk: Chunk, out: Path) -> Path:
    """The file of JSON lines that a chunk becomes."""
    return out / TEXT / recipe.name(chunk.source) / f"{chunk.number:05}.jsonl"


def token_shard(recipe: CorpusRecipe, chunk: Chunk, out: Path) -> Path:
    return out / TOKENS / recipe.name(chunk.source) / f"{chunk.number:05}.tokens"


def write(
    recipe: CorpusRecipe,
    chunk: Chunk,
    kept: Sequence[bool],
    encoder: WordEncoder | None,
    out: Path,
) -> tuple[int, int, int]:
    """Write a chunk's shards, those that are not there yet; returns (documents, bytes of text,
    tokens). A chunk of which nothing is left has none."""
    work = out / WORK
    if not any(kept):
        return 0, 0, 0
    count = size = 0
    text = text_shard(recipe, chunk, out)
    if recipe.text and not text.exists():
        with atomic.replacing(text) as file:
            for content, source in documents(work, chunk, kept):
                record = {"text": content, "source": source}
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    for content, _ in documents(work, chunk, kept):
        count, size = count + 1, size + len(content.encode())
    if encoder is None:
        return count, size, 0
    path = token_shard(recipe, chunk, out)
    if path.exists():
        return count, size, len(TokenFile(path))
    texts: Iterator[str] = (content for content, _ in documents(work, chunk, kept))
    return count, size, len(tokens.build(texts, encoder.tokenizer, path, encoder))


def finish(recipe: CorpusRecipe, chunks: Sequence[Chunk], tokenizer: Tokenizer, out: Path) -> None:
    """The manifest of each source's token shards; none of a source of which nothing is left."""
    for index in range(len(recipe.sources)):
        paths = [token_shard(recipe, c, out) for c in chunks if c.source == index]
        written = [path for path in paths if path.exists()]
        if written:
            shards.write_manifest(written[0].parent, written, tokenizer)
