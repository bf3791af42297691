"""One forward pass as arrays: what a device needs to know of a scheduler's step.

The order of its T tokens: prompts from their beginning, packed; chunks of prompts that have a past
in the cache; what decodes, each sequence's last token and the guesses behind it. All but the first
read pages, all are written to pages. The rows to draw from are the last ones.
"""

from dataclasses import dataclass

import numpy as np

from llama2rt.generate.slots import Slots


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens to compute: `tokens` from position `begin` on, in a sequence of `pages`."""

    tokens: np.ndarray
    begin: int
    pages: np.ndarray


@dataclass(frozen=True, slots=True)
class Step:
    """What the scheduler decides: chunks of prompts, the slots [B] that decode, the number of
    guesses behind the token of each [B] (None: there are none), and pages (source, target) to copy
    afterwards."""

    chunks: list[Chunk]
    rows: np.ndarray
    guesses: np.ndarray | None
    copies: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """S sequences read pages; N rows are drawn from."""

    tokens: np.ndarray
    """int32 [T]"""
    positions: np.ndarray
    """int32 [T]"""
    slots: np.ndarray
    """int64 [T]: page * page_size + offset, where keys and values of each token go"""
    cu_seqlens: np.ndarray
    """int32 [prompts + 1]: offsets of the packed prompts"""
    block_table: np.ndarray
    """int32 [S, W]"""
    lengths: np.ndarray
    """int32 [S], the new tokens included"""
    cu_seqlens_q: np.ndarray | None
    """int32 [S + 1]: offsets of the new tokens behind the packed prompts; None: one each"""
    drawn: np.ndarray
    """int64 [N]: slot of each row to draw from"""
    counts: np.ndarray
    """int32 [N]: tokens generated before that row's"""
    copies: np.ndarray
    """int64 [2, n]: pages to copy afterwards"""


def layout(step: Step, slots: Slots) -> Batch:
    """The arrays of `step`, read from the slots as they are before it is recorded."""
    size, rows = slots.page_size, step.rows
    whole = [chunk for chunk in step.chunks if chunk.begin == 0]
    later = [chunk for chunk in step.chunks if chunk.begin > 0]
    cached, counts, drawn = slots.cached[rows], slots.counts[rows], rows
    positions, ends = cached, cached + 1
    if step.guesses is not None:
        each = step.guesses + 1
        behind = np.arange(int(each.sum())) - (each.cumsum() - each).repeat(each)
        drawn, ends = rows.repeat(each), cached + each
        positions = (cached.repeat(each) + behind).astype(np.int32)
        counts = (counts.repeat(each) + behind).astype(np.int32)
    chunk_ends = np.array([chunk.begin + len(chunk.tokens) for chunk in later], np.int32)
    lengths = np.concatenate([chunk_ends, ends])
    width = -(-int(lengths.max(initial=0)) // size)
    table = slots.pages[rows, :width]
    if later:
        table = np.concatenate([np.zeros((len(later), width), np.int32), table])
        for row, chunk in zip(table, later, strict=False):
            row[: len(chunk.pages)] = chunk.pages[:width]
    ordered = [*whole, *later]
    sizes = np.array([0, *(len(chunk.tokens) for chunk in whole)], np.int32)
    return Batch(
        tokens=np.concatenate(
            [*(chunk.tokens for chunk in ordered), slots.tokens[drawn, positions]]
        ),
        positions=np.concatenate([*map(_positions, ordered), positions]),
        slots=np.concatenate(
            [
                *(_addresses(chunk.pages, _positions(chunk), size) for chunk in ordered),
                slots.pages[drawn, positions // size] * np.int64(size) + positions % size,
            ]
        ),
        cu_seqlens=sizes.cumsum(dtype=np.int32),
        block_table=table,
        lengths=lengths,
        cu_seqlens_q=_queries(later, step.guesses, len(rows)),
        drawn=drawn,
        counts=counts,
        copies=np.array(step.copies, np.int64).reshape(-1, 2).T,
    )


def _positions(chunk: Chunk) -> np.ndarray:
    return np.arange(chunk.begin, chunk.begin + len(chunk.tokens), dtype=np.int32)


def _addresses(pages: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    return pages[positions // size] * np.int64(size) + positions % size


def _queries(later: list[Chunk], guesses: np.ndarray | None, rows: int) -> np.ndarray | None:
    if not later and guesses is None:
        return None
    decoding = np.ones(rows, np.int64) if guesses is None else guesses + 1
    each = np.concatenate([[0], [len(chunk.tokens) for chunk in later], decoding])
    return each.cumsum().astype(np.int32)
