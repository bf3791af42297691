"""A tokenised corpus on disk: one memory-mapped stream of ids, each document BOS text EOS.

One file: a fixed-size JSON header, then the ids as uint16 (uint32 above 65,536 pieces). The header
has the digest of the tokenizer, so that a stream is never read with another one, the number of
bytes of text, so that a loss can be given in bits per byte, and the ids' hash. Nothing of the
corpus is held in memory. A corpus may be several files: the loader takes a list of them.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llama2rt import atomic
from llama2rt.data.packing import Batch
from llama2rt.data.records import Document
from llama2rt.errors import InputError
from llama2rt.text.tokenizer import Tokenizer

HEADER_BYTES = 1024
_FORMAT = "llama2rt-tokens-1"
_DOCUMENTS_AT_ONCE = 256  # bounds memory; enough for the tokenizer's threads


class TokenStream:
    """Ids of documents that lie end to end, memory-mapped: `len()` is their number; `text_bytes`
    (UTF-8, before tokenising) and `bos`."""

    def __init__(self, ids: np.ndarray, bos: int, text_bytes: int) -> None:
        self._ids, self.bos, self.text_bytes = ids, bos, text_bytes

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> np.ndarray:
        """All ids, memory-mapped."""
        return self._ids

    def pieces(self, begin: int, length: int) -> list[np.ndarray]:
        """The window of `length` ids from `begin` on, the stream read as a ring that leaves out the
        last id (which has no successor): its ids and the one behind them, [n + 1] of a piece, two
        pieces where it goes around the end. `begin` and `length` are at most the ring's."""
        ids = self.ids()
        beyond = begin + length - (len(ids) - 1)
        if beyond <= 0:
            return [ids[begin : begin + length + 1]]
        return [ids[begin:], ids[: beyond + 1]]

    def batches(self, context: int, micro_tokens: int) -> Iterator[Batch]:
        """The whole stream once, in order, in windows of `context`: for a held-out loss."""
        size = len(self) - 1
        step = max(micro_tokens // context, 1) * context
        for at in range(0, size, step):
            begins = range(at, min(at + step, size), context)
            yield pack_windows([(self, b, min(context, size - b)) for b in begins])


class TokenFile(TokenStream):
    """A token file opened for reading; also `documents`, `tokenizer` (its digest), `digest` (of the
    ids). InputError when the file is not one or is damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                header = json.loads(file.read(HEADER_BYTES))
            if header["format"] != _FORMAT:
                raise ValueError(header["format"])
            self.documents, text_bytes = int(header["documents"]), int(header["text_bytes"])
            self.tokenizer, self.digest = str(header["tokenizer"]), str(header["digest"])
            bos, length = int(header["bos"]), int(header["tokens"])
            dtype = np.dtype(header["dtype"])
        except OSError as error:
            raise InputError(f"{self.path}: cannot be opened ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}: not a token file of this version") from None
        expected = HEADER_BYTES + length * dtype.itemsize
        if self.path.stat().st_size != expected:
            raise InputError(
                f"{self.path}: damaged: {self.path.stat().st_size} bytes, expected {expected}"
            )
        ids = np.memmap(self.path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=length)
        # Slices of a memmap cost ten times those of an array.
        super().__init__(np.asarray(ids), bos, text_bytes)

    def require(self, tokenizer: Tokenizer) -> None:
        """InputError unless `tokenizer` made this file."""
        if tokenizer.digest != self.tokenizer:
            raise InputError(f"{self.path}: was made with another tokenizer; build it again")


Window = tuple[TokenStream, int, int]
"""(stream, its first id, its length)"""


def pack_windows(windows: Sequence[Window]) -> Batch:
    """One batch of windows, of streams of one tokenizer. A document begins where a window does, and
    at each BOS; nothing predicts a BOS."""
    return pack_groups([windows])[0]


def pack_groups(groups: Sequence[Sequence[Window]]) -> list[Batch]:
    """`pack_windows` of each group, such as the micro-batches of a step. All lie in one allocation:
    what is as large as a step comes from the system as new pages each time, and huge ones take a
    fraction of the time that the same bytes in small ones do."""
    totals = [sum(length for *_, length in windows) for windows in groups]
    tokens, targets = (np.empty(sum(totals), np.int64) for _ in range(2))
    positions = np.empty(sum(totals), np.int32)
    count = np.arange(max(totals, default=0), dtype=np.int32)
    batches, at = [], 0
    for windows, total in zip(groups, totals, strict=True):
        own = slice(at, at + total)
        cu_seqlens = _read(windows, tokens[own], targets[own])
        last = cu_seqlens[1:] - 1
        unpredicted = last[targets[own][last] == windows[0][0].bos]
        targets[own][unpredicted] = -1
        begins = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        np.subtract(count[:total], begins, out=positions[own])
        batches.append(
            Batch(
                tokens=torch.from_numpy(tokens[own]),
                positions=torch.from_numpy(positions[own]),
                cu_seqlens=torch.from_numpy(cu_seqlens),
                targets=torch.from_numpy(targets[own]),
                weight=total - len(unpredicted),
            )
        )
        at += total
    return batches


def _read(windows: Sequence[Window], tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Fill `tokens` and `targets` [T] with windows' ids and those behind them; returns where the
    documents begin and end, int32 [B+1]."""
    begins = np.empty(len(tokens), np.bool_)
    at = 0
    for stream, begin, length in windows:
        first = at
        for ids in stream.pieces(begin, length):
            end = at + len(ids) - 1
            tokens[at:end], targets[at:end] = ids[:-1], ids[1:]
            np.equal(ids[:-1], stream.bos, out=begins[at:end])
            at = end
        begins[first] = True
    starts = np.flatnonzero(begins)
    cu_seqlens = np.empty(len(starts) + 1, np.int32)
    cu_seqlens[:-1], cu_seqlens[-1] = starts, at
    return cu_seqlens


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """What a token file of this tokenizer keeps an id in."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


Encode = Callable[[list[str]], Iterable[Sequence[int] | np.ndarray]]
"""the ids of each of many texts"""


def build(
    documents: Iterable[Document | str],
    tokenizer: Tokenizer,
    path: str | Path,
    encode: Encode | None = None,
) -> TokenFile:
    """Tokenise `documents` into the file `path`, which appears only when it is complete. `encode`:
    what gives the tokenizer's ids, where something else than itself does. InputError when there is
    no document."""
    path = Path(path)
    encode = encode or tokenizer.encode_batch
    dtype = dtype_of(tokenizer)
    begin, end = (np.array([i], dtype).tobytes() for i in (tokenizer.bos, tokenizer.eos))
    texts = (text if isinstance(text, str) else text.text for text in documents)
    count = tokens = text_bytes = 0
    digest = hashlib.sha256()
    with atomic.replacing(path) as file:
        file.write(b" " * HEADER_BYTES)
        while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
            for text, ids in zip(batch, encode(batch), strict=True):
                data = b"".join((begin, np.asarray(ids, dtype).tobytes(), end))
                file.write(data)
                digest.update(data)
                count, tokens = count + 1, tokens + len(ids) + 2
                text_bytes += len(text.encode())
        if not count:
            raise InputError(f"{path}: no documents to tokenise")
        header = {
            "format": _FORMAT,
            "dtype": dtype.str,
            "tokens": tokens,
            "documents": count,
            "text_bytes": text_bytes,
            "bos": tokenizer.bos,
            "tokenizer": tokenizer.digest,
            "digest": digest.hexdigest(),
        }
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
    return TokenFile(path)


# Of a corpus that is read to estimate its tokens; a smaller one is read whole.
SAMPLED_BYTES = 4 << 20


class Estimated(NamedTuple):
    """How many tokens a stream will have."""

    value: float
    how: str
    """exact, or what the estimate rests on"""


def estimate(documents: Sequence[Document], tokenizer: Tokenizer | int) -> Estimated:
    """Tokens of the stream that `build` would make of `documents`, without writing it: of all of
    them where they are few, else by the tokens a byte of a sample that is drawn evenly from them.
    `tokenizer`: one that is still to be trained is given by its size; the sample trains it."""
    total = sum(len(document.text.encode()) for document in documents)
    every = max(1, -(-total // SAMPLED_BYTES))
    sample = [document.text for document in documents[::every]]
    # Few long documents: the beginning of each.
    most = max(1, SAMPLED_BYTES // max(1, len(sample)))
    if total > SAMPLED_BYTES:
        sample = [text.encode()[:most].decode(errors="ignore") for text in sample]
    read = sum(len(text.encode()) for text in sample)
    if isinstance(tokenizer, int):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Tokenizer.train(sample, tokenizer, Path(folder) / "tokenizer.model")
    pieces = sum(len(ids) for ids in tokenizer.encode_batch(sample))
    if read == total:
        return Estimated(pieces + 2 * len(documents), "exact")
    how = f"estimate from {read:,} of {total:,} bytes"
    return Estimated(pieces * total / max(1, read) + 2 * len(documents), how)


def split(
    documents: Iterable[Document | str], held_out: float
) -> tuple[list[Document], list[Document]]:
    """The documents without their last `held_out` fraction (of UTF-8 bytes), and that rest. The
    document on the border is cut after the line that crosses it, or after the word where the cut
    would leave nothing on one side (text8 is one line). InputError where it still does."""
    if not 0 < held_out < 1:
        raise InputError(f"held_out must lie between 0 and 1, got {held_out}")
    whole = [d if isinstance(d, Document) else Document(d) for d in documents]
    for unit in (b"\n", b" "):
        first, last = _cut(whole, held_out, unit)
        if first and last:
            return first, last
    raise InputError(f"too little text to hold out a fraction of {held_out}")


def _cut(
    documents: Sequence[Document], held_out: float, unit: bytes
) -> tuple[list[Document], list[Document]]:
    """`split` after the `unit` that ends at or behind the border; parts may be empty."""
    left = round(sum(len(d.text.encode()) for d in documents) * (1 - held_out))
    first: list[Document] = []
    last: list[Document] = []
    for document in documents:
        data = document.text.encode()
        end = data.find(unit, max(left - 1, 0))
        cut = 0 if left <= 0 else len(data) if end < 0 else end + 1
        left -= len(data)
        for part, text in ((first, data[:cut]), (last, data[cut:])):
            if text.strip():
                part.append(Document(text.decode(), document.source))
    return first, last


def shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """`sum(sizes)` divided in proportion to `weights` (largest remainders), or `sizes`
    themselves without weights."""
    if weights is None:
        return list(sizes)
    if len(weights) != len(sizes):
        raise InputError(f"{len(weights)} mixture weights for {len(sizes)} files")
    if any(not 0 < weight < float("inf") for weight in weights):
        raise InputError(f"mixture weights must be positive numbers, got {list(weights)}")
    exact = np.array(weights) / sum(weights) * sum(sizes)
    whole = np.floor(exact).astype(int)
    for index in np.argsort(whole - exact, kind="stable")[: sum(sizes) - whole.sum()]:
        whole[index] += 1
    return whole.tolist()
