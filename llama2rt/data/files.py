"""Rows of any file we read, each with its number, and a bad row as an InputError in its place.

JSON lines (also gzipped), a JSON array, plain text for documents, and, where pyarrow is installed,
Parquet files and folders of a saved Hugging Face dataset. All are read as a stream, except a JSON
array. Nested folders, CSV and archives are not read.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2rt.data import arrow, strict_json
from llama2rt.data.records import Document
from llama2rt.errors import InputError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MARK_REASON = "starts with a byte-order mark; save the file as plain UTF-8"


def rows(path: Path, kind: str, separator: str | None) -> Iterator[tuple[int, Any]]:
    """(line, or number of the row or of an array's item, from 1; row). A bad row comes as an
    InputError; a file that cannot be read on raises one with the path."""
    name = path.name.removesuffix(".gz")
    try:
        if path.is_dir():
            yield from arrow.dataset_rows(path)
        elif name.endswith(".parquet"):
            yield from arrow.parquet_rows(path)
        elif name.endswith(".txt"):
            if kind != "document":
                raise InputError(f"{path}: a .txt file holds documents, not {kind}s")
            yield from _text_rows(path, separator)
        else:
            yield from _json_rows(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def json_rows_between(path: Path, begin: int, end: int, line: int) -> Iterator[tuple[int, Any]]:
    """`rows` of the lines of a plain file of JSON lines that begin at the bytes `begin` to `end`,
    of which the first is line `line`."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            while begin < end and (text := file.readline()):
                begin += len(text)
                if text.strip():
                    try:
                        yield line, _parse(text)
                    except InputError as error:
                        yield line, error
                line += 1
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
    """One object a line; or, where the file begins with a bracket, the items of one array, which
    any name may hold (.json as most programs write it, .jsonl by mistake)."""
    lines = _lines(path)
    first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            yield from _array_rows(path, line + b"".join(lines))
            return
        first = False
        try:
            yield number, _parse(line)
        except InputError as error:
            yield number, error


def _parse(line: bytes) -> Any:
    if line.startswith(_BYTE_ORDER_MARK):
        raise InputError(_MARK_REASON)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start + 1} of the line") from None
    row = strict_json.parse(text)
    if isinstance(row, list):
        raise InputError("expected a JSON object, got a list; write one object a line")
    return row


def _array_rows(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    text = _decode(path, data)
    try:
        yield from enumerate(strict_json.items(text), start=1)
    except InputError as error:
        raise InputError(f"{path}:{error}") from None


def _text_rows(path: Path, separator: str | None) -> Iterator[tuple[int, Any]]:
    data = b"".join(_lines(path))
    if data.startswith(_BYTE_ORDER_MARK):
        raise InputError(f"{path}:1: {_MARK_REASON}")
    text = _decode(path, data)
    line = 1
    for piece in text.split(separator) if separator else [text]:
        if piece.strip():
            yield line, Document(piece, path.name).to_json()
        line += piece.count("\n") + (separator or "").count("\n")


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not valid UTF-8") from None
