"""The input in parts: each becomes one shard, and is read alike by whichever process reads it.

A part holds pieces of one source: whole files, or lines of a plain file of JSON lines, which is cut
at lines. Where the cuts are depends on the files and the size of a part alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.data import files
from llama2rt.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz")
"""of the files that are read of a folder"""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of one that begin at the bytes `begin` to `end`."""

    path: str
    begin: int = 0
    end: int | None = None
    """None for the whole file, whatever it is"""
    line: int = 1
    """number of the first"""


@dataclass(frozen=True)
class Chunk:
    """A part of one source."""

    source: int
    number: int
    """among the source's"""
    pieces: tuple[Piece, ...]
    size: int
    """bytes on disk"""


def files_of(path: Path) -> list[Path]:
    """What a source's path stands for: itself, or, of a folder that is no saved dataset, the files
    below it in the order of their paths. InputError where there is none, and for a folder without
    any."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = _below(path) if _is_plain_folder(path) else [path]
    if not found:
        raise InputError(f"{path}: no file below it ends with one of {', '.join(SUFFIXES)}")
    return found


def others_in(path: Path) -> list[Path]:
    """Files below a folder that are not read, because of their names."""
    if not _is_plain_folder(path):
        return []
    read = set(_below(path))
    # What a saved dataset's folder holds is read with it.
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not read & {file, *file.parents} and not file.name.startswith(".")
    ]


def _is_plain_folder(path: Path) -> bool:
    saved = ("state.json", "dataset_dict.json")
    return path.is_dir() and not any((path / name).exists() for name in saved)


def _below(path: Path) -> list[Path]:
    found: list[Path] = []
    for child in sorted(path.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            found += _below(child) if _is_plain_folder(child) else [child]
        elif child.name.endswith(SUFFIXES):
            found.append(child)
    return found


def divide(recipe: CorpusRecipe) -> list[Chunk]:
    """All chunks, source after source. Reads plain JSON lines once, to count their lines."""
    chunks: list[Chunk] = []
    for source, given in enumerate(recipe.sources):
        pieces: list[Piece] = []
        size = number = 0
        for file in files_of(given.path):
            for piece, held in _pieces(file, recipe.chunk_bytes):
                if pieces and size + held > recipe.chunk_bytes:
                    chunks.append(Chunk(source, number, tuple(pieces), size))
                    pieces, size, number = [], 0, number + 1
                pieces.append(piece)
                size += held
        chunks.append(Chunk(source, number, tuple(pieces), size))
    return chunks


def _pieces(path: Path, most: int) -> Iterator[tuple[Piece, int]]:
    """(piece, its bytes) of a file."""
    if path.is_dir():
        yield Piece(str(path)), sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        return
    size = path.stat().st_size
    if size <= most or not path.name.endswith((".jsonl", ".json")) or _is_array(path):
        yield Piece(str(path)), size
        return
    begin, line = 0, 1
    with open(path, "rb") as file:
        while begin < size:
            file.seek(min(begin + most, size))
            file.readline()  # to the end of the line that the cut falls into
            end = file.tell()
            yield Piece(str(path), begin, end, line), end - begin
            file.seek(begin)
            left = end - begin
            while left:
                block = file.read(min(_BLOCK, left))
                line += block.count(b"\n")
                left -= len(block)
            begin = end


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            if text := block.lstrip():
                return text.startswith(b"[")
    return False


def rows(piece: Piece, separator: str | None) -> Iterator[tuple[int, Any]]:
    """As of `data.files.rows`."""
    path = Path(piece.path)
    if piece.end is None:
        return files.rows(path, "document", separator)
    return files.json_rows_between(path, piece.begin, piece.end, piece.line)
