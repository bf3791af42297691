"""One chunk through the steps that look at a document alone.

What is left of it lies in three files of the work folder: the documents, an array a column of what
comparing them needs, and last what happened (`NAME.json`), so that a chunk with the last is done.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from llama2rt import atomic
from llama2rt.corpus import chunks, personal
from llama2rt.corpus.chunks import Chunk
from llama2rt.corpus.contamination import EvaluationSets
from llama2rt.corpus.duplicates import band_keys, bands_of
from llama2rt.corpus.language import language
from llama2rt.corpus.normalise import normalise
from llama2rt.corpus.quality import RULES
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.corpus.tally import Tally
from llama2rt.corpus.words import words_of
from llama2rt.data.file_reader import FileReader
from llama2rt.data.json_values import printable
from llama2rt.errors import InputError

_EXCERPT = 80
_BATCH = 64  # documents whose signatures are made at once


class Columns(NamedTuple):
    """Of the documents that a chunk keeps, in their order."""

    offset: np.ndarray
    """int64 [n]: where each begins in the file of documents"""
    piece: np.ndarray
    """int32 [n]: the piece of the chunk that it was read from"""
    line: np.ndarray
    """int64 [n]"""
    origin: np.ndarray
    """int32 [n], in the chunk's list of origins"""
    digest: np.ndarray
    """uint64 [n, 2]: of the text"""
    bands: np.ndarray
    """uint64 [n, bands]: keys that near-duplicates have in common; [n, 0] where not asked for"""


def name_of(chunk: Chunk) -> str:
    """What its files in the work folder are called."""
    return f"{chunk.source}-{chunk.number:05}"


def columns(folder: Path, chunk: Chunk) -> Columns:
    """What `clean` has kept of a chunk."""
    with np.load(folder / f"{name_of(chunk)}.npz") as arrays:
        return Columns(*(arrays[name] for name in Columns._fields))


def clean(
    recipe: CorpusRecipe, chunk: Chunk, sets: EvaluationSets | None, folder: Path
) -> dict[str, Any]:
    """Read a chunk, write what is left of it; returns the content of its `.json`, also where an
    earlier run has done it. InputError for more bad records than the recipe allows."""
    done = folder / f"{name_of(chunk)}.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    cleaner = _Cleaner(recipe, chunk, sets)
    with atomic.replacing(folder / f"{name_of(chunk)}.jsonl") as file:
        for line in cleaner.lines():
            cleaner.offset += file.write(line)
    with atomic.replacing(folder / f"{name_of(chunk)}.npz") as file:
        np.savez(file, **cleaner.columns()._asdict())
    result = {
        "tally": cleaner.tally.to_json(),
        "origins": [[name, *counts] for name, counts in cleaner.origins.items()],
    }
    atomic.write(done, json.dumps(result, ensure_ascii=False) + "\n")
    return result


class _Cleaner:
    """The steps over one chunk's documents."""

    def __init__(self, recipe: CorpusRecipe, chunk: Chunk, sets: EvaluationSets | None) -> None:
        self._recipe, self._chunk, self._sets = recipe, chunk, sets
        self._languages = frozenset(recipe.languages_of(chunk.source))
        self._rules = recipe.rules_of(chunk.source)
        self.tally = Tally()
        self.offset = 0
        """where the next document begins in the file"""
        self.origins: dict[str, list[int]] = {}
        """by name: documents, words, items of personal data"""
        self._number: dict[str, int] = {}
        """of an origin, in the order in which they came"""
        self._rows: list[tuple[int, int, int, int]] = []
        self._digests: list[bytes] = []
        self._bands: list[np.ndarray] = []
        self._unsigned: list[list[str]] = []
        """words of the latest documents, whose signatures are still to be made"""

    def lines(self) -> Iterator[bytes]:
        """What is left, a line of JSON a document."""
        for piece, line, document in self._documents():
            where = f"{self._chunk.pieces[piece].path}:{line}"
            self.tally.read += 1
            self.tally.read_bytes += len(document.text.encode())
            cleaned = self._cleaned(document.text, where)
            if cleaned is None:
                continue
            text, words = cleaned
            origin = self._count_origin(document.source)
            if self._recipe.personal_data or self._recipe.most_personal_data is not None:
                left = self._without_personal_data(text, where, origin, len(words))
                if left != text:
                    text, words = left, words_of(left)
            self._rows.append((self.offset, piece, line, self._number[origin]))
            self._digests.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
            if self._recipe.near_duplicates is not None:
                self._unsigned.append(words)
                if len(self._unsigned) == _BATCH:
                    self._sign()
            record = {"text": text, "source": document.source}
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"

    def columns(self) -> Columns:
        """Of the lines so far."""
        self._sign()
        rows = np.array(self._rows, np.int64).reshape(-1, 4)
        bands = bands_of(self._recipe.near_duplicates)
        return Columns(
            rows[:, 0],
            rows[:, 1].astype(np.int32),
            rows[:, 2],
            rows[:, 3].astype(np.int32),
            np.frombuffer(b"".join(self._digests), np.uint64).reshape(-1, 2),
            np.concatenate([np.empty((0, bands), np.uint64), *self._bands]),
        )

    def _documents(self) -> Iterator[tuple[int, int, Any]]:
        """(piece, line, record)."""
        recipe, index = self._recipe, self._chunk.source
        source = recipe.sources[index]
        for number, piece in enumerate(self._chunk.pieces):
            named = {"path": Path(piece.path), "source": source.source or recipe.name(index)}
            reader = FileReader(source.model_copy(update=named), "document", piece.path, {})
            for line, row in chunks.rows(piece, recipe.document_separator):
                records, fault = reader.take(line, row)
                if fault is not None:
                    self._tolerate(f"{piece.path}:{line}: {printable(str(fault), 500)}")
                yield from ((number, line, record) for record in records)
            self.tally.keys += reader.counts.unknown_keys

    def _tolerate(self, message: str) -> None:
        if len(self.tally.skipped) == self._recipe.skip_invalid:
            raise InputError(message)
        self.tally.skipped.append(message)

    def _cleaned(self, given: str, where: str) -> tuple[str, list[str]] | None:
        """(the text that the steps leave, its words); None where one removes it."""
        text = normalise(given, self._recipe.form)
        if text != given:
            self.tally.changed["normalise"] += 1
        if not text.strip():
            self._remove("empty", where, "blank once normalised", given)
            return None
        words = words_of(text)
        if self._languages:
            found = language(text, words)
            self.tally.languages[found] += 1
            if found not in self._languages:
                self._remove("language", where, found, text)
                return None
        for name in self._rules:
            left, reason = RULES[name](text)
            if reason is not None:
                self._remove(name, where, reason, text)
                return None
            if left != text:
                self.tally.changed[name] += 1
                text, words = left, words_of(left)
        if self._sets is not None and (match := self._sets.find(words)) is not None:
            self._remove("contamination", where, f"{match.where}: {match.words}", "")
            return None
        return text, words

    def _remove(self, step: str, where: str, reason: str, text: str) -> None:
        excerpt = f": {text.strip()[:_EXCERPT]!r}" if text else ""
        self.tally.removed.add(step, where, f"{reason}{excerpt}")

    def _without_personal_data(self, text: str, where: str, origin: str, words: int) -> str:
        replaced, kinds, items = personal.replace(text)
        self.origins[origin][1] += words
        self.origins[origin][2] += len(items)
        if not items or not self._recipe.personal_data:
            return text
        self.tally.replaced(where, kinds, items)
        return replaced

    def _count_origin(self, name: str) -> str:
        """The origin of a document whose source calls itself so."""
        try:
            host = urlsplit(name).hostname if "://" in name else None
        except ValueError:  # brackets that hold no address
            host = None
        origin = host or name
        self._number.setdefault(origin, len(self._number))
        self.origins.setdefault(origin, [0, 0, 0])[0] += 1
        return origin

    def _sign(self) -> None:
        least = self._recipe.near_duplicates
        if self._unsigned and least is not None:
            self._bands.append(band_keys(self._unsigned, least))
            self._unsigned.clear()


def documents(folder: Path, chunk: Chunk, kept: Sequence[bool]) -> Iterator[tuple[str, str]]:
    """(text, source) of the documents of a chunk that `kept`, one flag each, says."""
    with open(folder / f"{name_of(chunk)}.jsonl", "rb") as file:
        for line, wanted in zip(file, kept, strict=True):
            if wanted:
                record = json.loads(line)
                yield record["text"], record["source"]


def origins_rich_in_personal_data(
    recipe: CorpusRecipe, results: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Items of personal data per 1,000 words of those origins that have more than the recipe
    allows."""
    if recipe.most_personal_data is None:
        return {}
    totals: dict[str, Counter[str]] = {}
    for result in results:
        for name, _, words, items in result["origins"]:
            totals.setdefault(name, Counter()).update(words=words, items=items)
    rates = {name: 1000 * n["items"] / max(1, n["words"]) for name, n in totals.items()}
    return {name: r for name, r in sorted(rates.items()) if r > recipe.most_personal_data}
