"""GGUF files as containers: metadata, and tensors read in parts. Their meaning is in `gguf`.

Read here and not with the package `gguf`, whose reader (0.19) makes two arrays of every entry of
every list, 17 seconds and 600 MiB for a vocabulary of Llama 3's size (here 0.4 and 30), does not
know split files, and of a file that was cut off does not say which tensor lacks. Format:
docs/gguf.md of ggml, versions 2 and 3, little-endian.
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2rt.checkpoint.weight import Area
from llama2rt.errors import InputError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_STRING, _ARRAY = 8, 9
# Number of a value's type -> its code in numpy.
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# Of ggml's tensor types, those that are read, and the names of the others for messages.
_F32, _F16, _Q8_0, _BF16 = 0, 1, 8, 30
_TYPES = {
    _F32: "F32",
    _F16: "F16",
    _BF16: "BF16",
    _Q8_0: "Q8_0",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
_DTYPES = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16, _Q8_0: torch.float32}
# A block of Q8_0: its scale in fp16, then 32 integers.
_BLOCK, _BLOCK_BYTES = 32, 34


class StoredTensor(NamedTuple):
    """Where a tensor lies, and as what."""

    path: Path
    name: str
    shape: torch.Size
    kind: int
    """ggml's number of its type"""
    begin: int
    """byte of the file"""

    @property
    def dtype(self) -> torch.dtype:
        """What `rows` returns."""
        return _DTYPES[self.kind]

    @property
    def row_bytes(self) -> int:
        elements = self.shape[-1]
        if self.kind == _Q8_0:
            return elements // _BLOCK * _BLOCK_BYTES
        return elements * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def quantized(self) -> bool:
        return self.kind == _Q8_0

    def require_readable(self) -> None:
        """InputError for a type that is not read here, and where the file ends before it."""
        if self.kind not in _DTYPES:
            found = _TYPES.get(self.kind, f"type {self.kind}")
            raise InputError(
                f"{self.path}: {self.name}: stored as {found}; only F32, F16, BF16 and Q8_0 are "
                "read"
            )
        if self.quantized and self.shape[-1] % _BLOCK:
            raise InputError(
                f"{self.path}: {self.name}: damaged: Q8_0 has rows of whole blocks of {_BLOCK}, "
                f"this one {self.shape[-1]} elements"
            )
        size = self.path.stat().st_size
        if self.begin + self.nbytes > size:
            raise InputError(
                f"{self.path}: {self.name}: damaged or cut off: ends at byte "
                f"{self.begin + self.nbytes}, the file at {size}"
            )

    def read(self, area: Area) -> Tensor:
        """The part of it in an area, in `dtype`; InputError where the file has become shorter."""
        rows, *columns = area
        return self.rows(rows.start, rows.stop)[:, *columns] if columns else self._vector()[area]

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows of a matrix. Read and not mapped: pages of a mapped file count as this process's
        memory, and a file that is cut off meanwhile would end the process."""
        if not self.quantized:
            return self._bytes(begin, end).view(self.dtype)
        whole = torch.empty(end - begin, self.shape[1])
        step = max(1, (4 << 20) // self.row_bytes)
        for first in range(begin, end, step):
            last = min(first + step, end)
            blocks = self._bytes(first, last).view(last - first, -1, _BLOCK_BYTES)
            scales = blocks[..., :2].contiguous().view(torch.float16).float()
            integers = blocks[..., 2:].view(torch.int8)
            part = whole[first - begin : last - begin].view(last - first, -1, _BLOCK)
            torch.mul(integers, scales, out=part)
        return whole

    def _vector(self) -> Tensor:
        stored = self._bytes(0, 1)[0]
        if not self.quantized:
            return stored.view(self.dtype)
        matrix = self._replace(shape=torch.Size((1, *self.shape)))
        return matrix.rows(0, 1)[0]

    def _bytes(self, begin: int, end: int) -> Tensor:
        """[rows, bytes of a row] of the file."""
        count = (end - begin) * self.row_bytes
        try:
            at = self.begin + begin * self.row_bytes
            values = np.fromfile(self.path, np.uint8, count, offset=at)
        except OSError as error:
            raise InputError(f"{self.path}: {self.name}: cannot be read ({error})") from None
        if len(values) < count:
            raise InputError(f"{self.path}: {self.name}: damaged or cut off")
        return torch.from_numpy(values).view(end - begin, self.row_bytes)


@dataclass(frozen=True)
class Contents:
    """What a model's file, or the first of its files, says, and the tensors of all of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file says that it is one."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path) -> Contents:
    """A file's metadata and tensors, or those of all files of a model that is split, whichever of
    them is named. No values of tensors are read. InputError names the file, and the key or tensor,
    that is damaged or missing."""
    contents = _read_one(path)
    count = contents.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return contents
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{path}: split.count: this is one of {count} files, which are to be called "
            f"NAME-00001-of-{count:05}.gguf and so on"
        )
    files = []
    for number in range(1, count + 1):
        part = path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise InputError(f"{part}: missing, one of the {count} files of this model")
        files.append(contents if part == path else _read_one(part))
        own = files[-1].metadata
        if (own.get("split.no"), own.get("split.count")) != (number - 1, count):
            raise InputError(
                f"{part}: split.no: expected {number - 1} of {count}, got {own.get('split.no')} of "
                f"{own.get('split.count')}"
            )
    return _joined(files)


def _joined(files: list[Contents]) -> Contents:
    first = files[0]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise InputError(f"{file.path}: {name}: also in {tensors[name].path.name}")
            tensors[name] = tensor
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise InputError(
            f"{first.path}: split.tensors.count: expected {expected} in {len(files)} files, got "
            f"{len(tensors)}"
        )
    return Contents(first.path, first.metadata, tensors)


# --- one file ---------------------------------------------------------------------------------


def _read_one(path: Path) -> Contents:
    try:
        with open(path, "rb") as file:
            cursor = _Cursor(path, file)
            return _contents(path, cursor)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _contents(path: Path, cursor: "_Cursor") -> Contents:
    if cursor.take(4) != MAGIC:
        raise InputError(f"{path}: not a GGUF file")
    version = cursor.number("<u4")
    if not version & 0xFFFF:
        raise InputError(f"{path}: a big-endian file; only little-endian ones are read")
    if version not in _VERSIONS:
        raise InputError(f"{path}: GGUF version {version}; expected one of 2, 3")
    tensor_count, entry_count = cursor.number("<u8"), cursor.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text()
        if key in metadata:
            raise InputError(f"{path}: {key}: twice in the metadata")
        cursor.after = key
        metadata[key] = cursor.value(cursor.number("<u4"))
    listed = list(_listed(cursor, tensor_count))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise InputError(
            f"{path}: general.alignment: expected a power of two of at least 8, got {alignment!r}"
        )
    data = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise InputError(f"{path}: {name}: twice in the list of tensors")
        if offset % alignment:
            raise InputError(f"{path}: {name}: damaged: offset {offset} is not aligned")
        tensors[name] = StoredTensor(path, name, shape, kind, data + offset)
    return Contents(path, metadata, tensors)


def _listed(cursor: "_Cursor", count: int) -> Iterator[tuple[str, torch.Size, int, int]]:
    """(name, shape, type, offset in the data) of each tensor. The file has the fastest dimension
    first, torch the slowest."""
    for _ in range(count):
        name = cursor.text()
        cursor.after = name
        dimensions = cursor.number("<u4")
        if not 1 <= dimensions <= 4:
            raise InputError(f"{cursor.path}: {name}: damaged: {dimensions} dimensions")
        sizes = [cursor.number("<u8") for _ in range(dimensions)]
        if prod(sizes) >= 1 << 62:
            raise InputError(f"{cursor.path}: {name}: damaged: a shape of {sizes[::-1]}")
        kind = cursor.number("<u4")
        yield name, torch.Size(sizes[::-1]), kind, cursor.number("<u8")


class _Cursor:
    """Reads values one after the other; InputError where the file ends within one."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.at = 0
        self.after = ""
        """name of the key or tensor that was read last"""
        self._size = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        # Compared first: a damaged length may be larger than any memory.
        if count > self._size - self.at:
            where = f" after {self.after}" if self.after else ""
            raise InputError(
                f"{self.path}: damaged or cut off: ends at byte {self._size}, within the "
                f"{'description' if where else 'header'}{where}"
            )
        self.at += count
        return self._file.read(count)

    def number(self, code: str) -> Any:
        return np.frombuffer(self.take(np.dtype(code).itemsize), code)[0].item()

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {self.after}: damaged: {error}") from None

    def value(self, kind: int) -> Any:
        """A number, a text, or a list of either."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise InputError(f"{self.path}: {self.after}: damaged: no values of type {kind}")
        inner, length = self.number("<u4"), self.number("<u8")
        if inner == _STRING:
            # Each takes at least its length's 8 bytes: a damaged count ends at the file's end.
            return [self.text() for _ in range(length)]
        if inner not in _SCALARS:
            raise InputError(f"{self.path}: {self.after}: a list of type {inner} is not read")
        code = _SCALARS[inner]
        return np.frombuffer(self.take(length * np.dtype(code).itemsize), code).tolist()
