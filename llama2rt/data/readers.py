"""Files in, records out, and every complaint with its FILE:LINE.

JSON lines (also gzipped), plain text for documents, and, where pyarrow is installed, Parquet files
and folders of a saved Hugging Face dataset. A row is taken as our own record or as one of the
``formats`` other people publish. Files are read as a stream; what is not read here: nested folders,
CSV, compressed Parquet inside archives.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, NoReturn

from llama2rt import atomic
from llama2rt.data.formats import Convert, recognise
from llama2rt.data.records import RECORDS, Document, Prompt, Record
from llama2rt.errors import InputError

logger = logging.getLogger("llama2rt.data")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Row = dict[str, Any]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(
    paths: Paths, kind: str, skip_invalid: int = 0, document_separator: str | None = None
) -> list[Any]:
    """All records of ``kind`` ("document", "dialogue", "prompt", "comparison", "sample") in one or
    more files. Up to ``skip_invalid`` bad records are left out, each logged as a warning; one more
    is an InputError, and so is a file without records.

    A ``.txt`` file is one document, since what is far apart in a text still belongs together
    (TinyShakespeare's speeches make scenes); where ``document_separator`` is given, such as
    "<|endoftext|>", the file is cut there and blank pieces are left out.
    """
    return list(iterate(paths, kind, skip_invalid, document_separator))


def iterate(
    paths: Paths, kind: str, skip_invalid: int = 0, document_separator: str | None = None
) -> Iterator[Any]:
    """``read``, one record at a time and nothing held in memory."""
    reader = Reader(paths, kind, skip_invalid, document_separator)
    yield from reader
    for message in reader.skipped:
        logger.warning("skipped %s", message)


class Reader:
    """Iterable over the records of ``read``, which knows afterwards what it met: ``skipped`` (the
    messages of tolerated records), ``rows``, ``rows_without_records`` (left out by their format's
    own rule), ``formats`` and ``ignored_keys`` (counts by name)."""

    def __init__(
        self,
        paths: Paths,
        kind: str,
        skip_invalid: int = 0,
        document_separator: str | None = None,
    ) -> None:
        if kind not in RECORDS:
            raise InputError(f"unknown kind {kind!r}: expected one of {', '.join(RECORDS)}")
        if skip_invalid < 0:
            raise InputError(f"skip_invalid must be at least 0, got {skip_invalid}")
        self.paths = [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        self.kind, self.skip_invalid, self.document_separator = (
            kind,
            skip_invalid,
            document_separator,
        )
        # Ids for prompts without one; files of one name in two folders must not share them.
        names = Counter(path.name for path in self.paths)
        self._names = {path: path.name if names[path.name] == 1 else path for path in self.paths}
        self._reset()

    def _reset(self) -> None:
        self.skipped: list[str] = []
        self.rows = self.rows_without_records = 0
        self.formats: Counter[str] = Counter()
        self.ignored_keys: Counter[str] = Counter()
        self._first_seen: dict[str, str] = {}

    def __iter__(self) -> Iterator[Any]:
        self._reset()
        for path in self.paths:
            rows_before = self.rows
            any_record = False
            converters: dict[str, Convert] = {}
            for line, row in _rows(path, self.kind, self.document_separator):
                self.rows += 1
                try:
                    records = self._records(row, path, line, converters)
                except InputError as error:
                    self._tolerate(f"{path}:{line}: {error}")
                    continue
                self.rows_without_records += not records
                any_record = any_record or bool(records)
                yield from records
            if self.rows == rows_before:
                raise InputError(f"{path}:1: no records: the file is empty")
            if not any_record:
                raise InputError(f"{path}: no records: none of its rows gives one")

    def _records(
        self, row: Row | InputError, path: Path, line: int, converters: dict[str, Convert]
    ) -> list[Record]:
        if isinstance(row, InputError):
            raise row
        record = RECORDS[self.kind]
        foreign = recognise(row, self.kind) if isinstance(row, dict) else None
        if foreign is None:
            found = [record.from_json(row)]
            self.ignored_keys.update(row.keys() - {f.name for f in fields(record)})
            self.formats["llama2rt"] += 1
        else:
            convert = converters.setdefault(foreign.name, foreign.start())
            objects = list(convert(row))
            if self.kind == "prompt":
                objects = [{"id": f"{self._names[path]}:{line}", **obj} for obj in objects]
            found = [record.from_json(obj) for obj in objects]
            self.formats[foreign.name] += 1
        for item in found:
            if isinstance(item, Prompt):
                if item.id in self._first_seen:
                    first = self._first_seen[item.id]
                    raise InputError(f"duplicate id {item.id!r}, first used at {first}")
                self._first_seen[item.id] = f"{path}:{line}"
        return found

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


def _rows(path: Path, kind: str, separator: str | None) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1, row) of any file we read; a bad line comes as an InputError."""
    name = path.name.removesuffix(".gz")
    try:
        if path.is_dir():
            yield from _dataset_rows(path)
        elif name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif name.endswith(".txt"):
            if kind != "document":
                raise InputError(f"{path}: a .txt file holds documents, not {kind}s")
            yield from _text_rows(path, separator)
        else:
            yield from _json_rows(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for line in file:
                number += 1
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{path}:{number + 1}: truncated or damaged gzip data ({error})"
            ) from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield number, _parse(line)
            except InputError as error:
                yield number, error


def _parse(line: bytes) -> Row:
    if line.startswith(_BYTE_ORDER_MARK):
        raise InputError("starts with a byte-order mark; save the file as plain UTF-8")
    try:
        row = json.loads(
            line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")  # some of the library's messages end so
        raise InputError(f"invalid JSON: {reason} at column {error.colno}") from None
    except RecursionError:
        raise InputError("invalid JSON: nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"invalid JSON: {error}") from None
    if isinstance(row, list):
        raise InputError("expected a JSON object, got a list; write one object a line")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a number that JSON or we accept")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise InputError(f"key {key!r} occurs twice")
    return row


def _text_rows(path: Path, separator: str | None) -> Iterator[tuple[int, Any]]:
    data = b"".join(_lines(path))
    if data.startswith(_BYTE_ORDER_MARK):
        raise InputError(f"{path}:1: starts with a byte-order mark; save the file as plain UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not valid UTF-8") from None
    line = 1
    for piece in text.split(separator) if separator else [text]:
        if piece.strip():
            yield line, Document(piece, path.name).to_json()
        line += piece.count("\n") + (separator or "").count("\n")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    pyarrow = _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: damaged Parquet file ({error})") from None


def _dataset_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        raise InputError(f"{path}: holds several splits; name one: {', '.join(splits)}")
    if not (path / "state.json").is_file():
        raise InputError(f"{path}: a folder, but not a saved Hugging Face dataset (no state.json)")
    pyarrow = _pyarrow(path)
    files = [
        part["filename"] for part in json.loads((path / "state.json").read_text())["_data_files"]
    ]
    number = 0
    for name in files:
        try:
            with pyarrow.memory_map(str(path / name)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path / name}: damaged Arrow file ({error})") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{path}: reading this needs pyarrow: pip install pyarrow") from None
    return pyarrow
