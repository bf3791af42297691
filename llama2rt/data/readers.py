"""Records of files; every error names its FILE:LINE.

A row of a file is our own record, or in one of the published `formats`; our own keys are read in
either. What is not used is counted and named: keys that nothing reads, pairs and answers that a
rule leaves out, bad records that were tolerated.
"""

import gzip
import json
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llama2rt import atomic
from llama2rt.data.file_reader import FileCounts, FileReader
from llama2rt.data.files import rows
from llama2rt.data.filters import NO_FILTERS, Filters, Located
from llama2rt.data.json_values import printable
from llama2rt.data.records import RECORDS, Record
from llama2rt.data.removed import Removed
from llama2rt.data.sources import Source
from llama2rt.data.votes import consensus, same_pair
from llama2rt.errors import InputError

logger = logging.getLogger("llama2rt.data")

AnyPath = str | os.PathLike[str]
Paths = AnyPath | Sequence[AnyPath]

LONGEST_REASON = 500
"""characters of what is wrong with a row: a hostile one may have a key of a megabyte"""


def read(
    paths: Paths,
    kind: str,
    skip_invalid: int = 0,
    document_separator: str | None = None,
    format: str | None = None,
) -> list[Any]:
    """All records of `kind` ("document", "dialogue", "prompt", "comparison", "sample") in one or
    more files, each a path or a `Source`. Up to `skip_invalid` bad records are left out, each
    logged as a warning; one more is an InputError, and so is a file without records. Whatever else
    was left out or not used is logged in one line a file.

    A `.txt` file is one document, since the parts of a long text belong together (TinyShakespeare's
    speeches make scenes). Where `document_separator` is given, such as "<|endoftext|>", the file
    is cut there and blank pieces are left out.

    `format` names the format of the rows ("trl-explicit-prompt"; "llama2rt" is our own) of each
    file whose `Source` names none. Without it each row is recognised by its keys, and one that two
    formats could claim is an InputError that names both.
    """
    return list(iterate(paths, kind, skip_invalid, document_separator, format))


def iterate(
    paths: Paths,
    kind: str,
    skip_invalid: int = 0,
    document_separator: str | None = None,
    format: str | None = None,
) -> Iterator[Any]:
    """`read`, one record at a time and nothing held in memory."""
    reader = Reader(paths, kind, skip_invalid, document_separator, format)
    yield from reader
    reader.log()


class Reader:
    """Iterable over the records of `read`. Afterwards it holds counts: `skipped` (the messages of
    tolerated records), `rows`, `rows_without_records` (left out by their format's own rule),
    `formats` (counts by name) and `files` (`FileCounts` of each). Of `filters` only those of rows
    apply here (`data.filters`)."""

    def __init__(
        self,
        paths: Paths,
        kind: str,
        skip_invalid: int = 0,
        document_separator: str | None = None,
        format: str | None = None,
        filters: Filters = NO_FILTERS,
    ) -> None:
        if kind not in RECORDS:
            raise InputError(f"unknown kind {kind!r}: expected one of {', '.join(RECORDS)}")
        if skip_invalid < 0:
            raise InputError(f"skip_invalid must be at least 0, got {skip_invalid}")
        given = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.sources = [Source.of(path).in_format(format) for path in given]
        self.paths = [source.path for source in self.sources]
        self.kind, self.skip_invalid = kind, skip_invalid
        self.document_separator = document_separator
        self.filters = filters
        filters.require_meaning(kind)
        for source in self.sources:
            source.require_meaning(kind)
        # Ids for prompts without one; files of one name in two folders must not share them.
        names = Counter(path.name for path in self.paths)
        self._names = {path: path.name if names[path.name] == 1 else path for path in self.paths}
        self._reset()

    def _reset(self) -> None:
        self.skipped: list[str] = []
        self.rows = self.rows_without_records = 0
        self.formats: Counter[str] = Counter()
        self.files: list[FileCounts] = []
        self._first_seen: dict[str, str] = {}

    @property
    def ignored_keys(self) -> Counter[str]:
        """Keys that nothing reads, of all files."""
        return sum((file.unknown_keys for file in self.files), Counter())

    @property
    def carried_keys(self) -> Counter[str]:
        """Keys that nothing reads and that their format is known to carry, of all files."""
        return sum((file.carried_keys for file in self.files), Counter())

    @property
    def removed(self) -> Removed:
        """What filters leave out of the rows, of all files."""
        found = Removed(self.filters.active)
        for file in self.files:
            found.update(file.removed)
        return found

    @property
    def left_out(self) -> Counter[str]:
        """Pairs, answers and records that a rule leaves out, by reason, of all files."""
        found: Counter[str] = Counter()
        for file in self.files:
            found += file.selection.left_out
            found += Counter({f"records of kind {k}": n for k, n in file.other_kinds.items()})
        return found

    def log(self) -> None:
        """Say what was skipped, left out and not used."""
        for message in self.skipped:
            logger.warning("skipped %s", message)
        for file in self.files:
            for message in file.warnings():
                logger.warning("%s", message)
            for message in file.notes():
                logger.info("%s", message)

    def __iter__(self) -> Iterator[Any]:
        return (record for _, _, record in self.numbered())

    def by_file(self) -> list[list[Any]]:
        """The records of each file apart, in the order of `paths`."""
        found: list[list[Any]] = [[] for _ in self.paths]
        for index, _, record in self.numbered():
            found[index].append(record)
        return found

    def located_by_file(self) -> list[list[Located]]:
        """`by_file`, each record with its FILE:LINE, for `filters.keep`."""
        found: list[list[Located]] = [[] for _ in self.paths]
        for index, line, record in self.numbered():
            found[index].append(Located(record, self.paths[index], line))
        return found

    def numbered(self) -> Iterator[tuple[int, int, Any]]:
        """(index of the file in `paths`, line, record)."""
        self._reset()
        for index, source in enumerate(self.sources):
            name = self._names[source.path]
            file = FileReader(source, self.kind, name, self._first_seen, self.filters)
            self.files.append(file.counts)
            rows_before, any_record = self.rows, False
            records = self._records(file)
            if source.consensus:
                records = self._decided(file.counts, records)
            for line, record in records:
                any_record = True
                yield index, line, record
            self.formats += file.counts.formats
            if self.rows == rows_before:
                raise InputError(f"{source.path}:1: no records: the file is empty")
            if not any_record:
                raise InputError(f"{source.path}: no records: {file.why_none()}")

    def _records(self, file: FileReader) -> Iterator[tuple[int, Any]]:
        path = file.source.path
        for line, row in rows(path, self.kind, self.document_separator):
            self.rows += 1
            before = file.counts.removed.counts.total()
            records, fault = file.take(line, row)
            if fault is not None:
                self._tolerate(f"{path}:{line}: {printable(str(fault), LONGEST_REASON)}")
            elif not records and file.counts.removed.counts.total() == before:
                self.rows_without_records += 1
            yield from ((line, record) for record in records)

    @staticmethod
    def _decided(
        counts: FileCounts, records: Iterator[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """Pairs, each with the line of its first judgement."""
        found = list(records)
        first: dict[Hashable, int] = {}
        for line, record in found:
            first.setdefault(same_pair(record) or id(record), line)
        decided, left_out = consensus(record for _, record in found)
        counts.selection.left_out += left_out
        for record in decided:
            yield first[same_pair(record) or id(record)], record

    def _tolerate(self, message: str) -> None:
        if len(self.skipped) == self.skip_invalid:
            if self.skip_invalid:
                message += f" (after {self.skip_invalid} skipped, as many as skip_invalid allows)"
            raise InputError(message)
        self.skipped.append(message)


def write(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write JSON lines (gzipped when the name ends in .gz) that appear only when complete. The same
    records give the same bytes. InputError for a number that is not finite."""
    path = Path(path)
    with atomic.replacing(path) as raw:
        file: IO[bytes] = raw
        if path.suffix == ".gz":
            file = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)  # type: ignore[assignment]
        for number, record in enumerate(records, start=1):
            try:
                line = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False)
                file.write(line.encode() + b"\n")
            except ValueError as error:
                raise InputError(f"{path}:{number}: cannot be written: {error}") from None
        if file is not raw:
            file.close()
