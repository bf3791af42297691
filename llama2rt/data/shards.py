"""A source of pretraining text as token shards: a folder of token files, and a manifest that names
them in order with their hashes.

A shard is opened when it is read, so that a source of any size costs its rows of the manifest. The
hashes are of whole files: `verify` finds one that has changed since the manifest was written, and
does not read again what has kept its size and time of modification since it last did.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt import atomic
from llama2rt.data.packing import Batch
from llama2rt.data.tokens import TokenFile, TokenStream
from llama2rt.errors import InputError
from llama2rt.text.tokenizer import Tokenizer

MANIFEST = "manifest.json"
_FORMAT = "llama2rt-shards-1"
_OPEN = 256
"""files mapped at a time, of all sources together: a step's windows may come from any number of
shards, each map keeps a descriptor, and a process has 1,024 of them where nobody asked for more"""
_SCANNED = 1 << 20  # ids read at once in search of a document's beginning


@dataclass(frozen=True)
class Shard:
    """A row of the manifest."""

    file: str
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8, before tokenising"""
    size: int
    """bytes of the file"""
    sha256: str
    """of the file"""

    @classmethod
    def of(cls, path: Path) -> "Shard":
        """Of a token file, which is read whole."""
        file = TokenFile(path)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = path.stat().st_size
        return cls(path.name, len(file), file.documents, file.text_bytes, size, digest)


class Shards:
    """A folder of shards, opened: `tokens`, `documents` and `text_bytes` of all, `lengths` (tokens
    of each), `bos`, `digest` (changes when any shard does). InputError where the folder holds no
    manifest, or a file that it names is not there or has another size."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            text = path.read_bytes()
            read = json.loads(text)
            if read["format"] != _FORMAT:
                raise ValueError(read["format"])
            self.tokenizer, self.bos = str(read["tokenizer"]), int(read["bos"])
            self.shards = [Shard(**row) for row in read["shards"]]
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not a manifest of token shards of this version") from None
        for shard in self.shards:
            size = _stat(self.folder / shard.file).st_size
            if size != shard.size:
                raise InputError(
                    f"{self.folder / shard.file}: damaged: {size} bytes, expected {shard.size}"
                )
        self.digest = hashlib.sha256(text).hexdigest()
        self.lengths = [shard.tokens for shard in self.shards]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    def require(self, tokenizer: Tokenizer) -> None:
        """InputError unless `tokenizer` made these shards."""
        if tokenizer.digest != self.tokenizer:
            raise InputError(f"{self.folder}: was made with another tokenizer; build it again")

    def stream(self, index: int) -> TokenStream:
        """The ids of shard `index`, as many as `lengths` says. They can be held in any number: the
        file is opened when ids are read, which raises InputError where it is damaged."""
        shard = self.shards[index]
        opened = functools.partial(_mapped, self.folder / shard.file, shard)
        return _ShardStream(opened, self.lengths[index], self.bos, shard.text_bytes)

    def verify(self, known: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Read every shard and compare its hash with the manifest's; returns what `known` has to be
        the next time: {path: [bytes, time of modification, hash]}, and a file for which all three
        still hold is not read. InputError naming the file that has changed."""
        seen: dict[str, list[Any]] = {}
        for shard in self.shards:
            path = self.folder / shard.file
            stat = _stat(path)
            found = [stat.st_size, stat.st_mtime_ns, shard.sha256]
            key = str(path.resolve())
            if list(known.get(key, ())) != found:
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != shard.sha256:
                    raise InputError(
                        f"{path}: has changed since {MANIFEST} beside it was written: restore it, "
                        "or build the shards again"
                    )
            seen[key] = found
        return seen

    def hold_out(self, fraction: float, tokenizer: Tokenizer) -> "tuple[Shards, HeldOut] | None":
        """(the shards without their last `fraction` of tokens, that end), parted where a document
        begins; None where that would leave nothing on one side. `tokenizer` gives the end its
        number of bytes."""
        ends = list(itertools.accumulate(self.lengths))
        at = round(ends[-1] * (1 - fraction)) if ends else 0
        first = bisect.bisect_right(ends, at)
        if first == len(ends):
            return None
        cut = _next_document(self.stream(first), at - (ends[first] - self.lengths[first]))
        if cut == self.lengths[first]:
            first, cut = first + 1, 0
        if first == len(ends) or (first, cut) == (0, 0):
            return None
        streams = [self.stream(i) for i in range(first, len(ends))]
        text_bytes = sum(shard.text_bytes for shard in self.shards[first:])
        if cut:
            rest = streams[0].ids()[cut:]
            held = sum(_text_bytes(rest, self.bos, tokenizer))
            text_bytes += held - self.shards[first].text_bytes
            streams[0] = TokenStream(rest, self.bos, held)
        kept = Shards(self.folder)
        kept.lengths = self.lengths[:first] + ([cut] if cut else [])
        return kept, HeldOut(streams, text_bytes)


class _ShardStream(TokenStream):
    """The first `length` of the ids that `opened` gives, which are not kept."""

    def __init__(
        self, opened: Callable[[], np.ndarray], length: int, bos: int, text_bytes: int
    ) -> None:
        self._opened, self._length = opened, length
        self.bos, self.text_bytes = bos, text_bytes

    def __len__(self) -> int:
        return self._length

    def ids(self) -> np.ndarray:
        return self._opened()[: self._length]


@functools.lru_cache(maxsize=_OPEN)
def _mapped(path: Path, shard: Shard) -> np.ndarray:
    """All ids of a token file that has to be as its row says."""
    file = TokenFile(path)
    if len(file) != shard.tokens:
        raise InputError(f"{path}: damaged: {len(file)} ids, expected {shard.tokens}")
    return file.ids()


@dataclass(frozen=True)
class HeldOut:
    """The end of a source, to measure a loss on."""

    streams: Sequence[TokenStream]
    text_bytes: int

    def batches(self, context: int, micro_tokens: int) -> Iterator[Batch]:
        """As of `TokenStream`, one stream after another."""
        for stream in self.streams:
            yield from stream.batches(context, micro_tokens)


def write_manifest(folder: Path, files: Iterable[Path | Shard], tokenizer: Tokenizer) -> Shards:
    """The manifest of token files in `folder`, in this order, which is written last: a folder that
    has one is complete."""
    rows = [file if isinstance(file, Shard) else Shard.of(file) for file in files]
    content = {
        "format": _FORMAT,
        "tokenizer": tokenizer.digest,
        "bos": tokenizer.bos,
        "tokens": sum(row.tokens for row in rows),
        "documents": sum(row.documents for row in rows),
        "text_bytes": sum(row.text_bytes for row in rows),
        "shards": [asdict(row) for row in rows],
    }
    atomic.write(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    return Shards(folder)


def is_folder_of(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of shards, of this version or another."""
    try:
        return str(json.loads((path / MANIFEST).read_bytes())["format"]).startswith(
            _FORMAT.rpartition("-")[0]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from None


def _next_document(stream: TokenStream, begin: int) -> int:
    """Where the first document at or behind `begin` begins; the stream's length if none does."""
    ids = stream.ids()
    for at in range(begin, len(ids), _SCANNED):
        found = np.flatnonzero(ids[at : at + _SCANNED] == stream.bos)
        if len(found):
            return at + int(found[0])
    return len(ids)


def _text_bytes(ids: np.ndarray, bos: int, tokenizer: Tokenizer) -> Iterator[int]:
    """Bytes of text of each document."""
    starts = np.flatnonzero(ids == bos).tolist()
    for begin, end in itertools.pairwise([*starts, len(ids)]):
        yield len(tokenizer.decode(ids[begin + 1 : end - 1].tolist()).encode())
