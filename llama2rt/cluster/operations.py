"""The collectives that are measured: what each one moves, how it is called, what it must yield.

Sizes follow nccl-tests: S is the largest buffer a rank holds, in bytes, so the input of a
reduce-scatter, the output of an all-gather, either buffer of an all-to-all. The bus bandwidth is
S / t times a factor that makes it comparable with the rate of a link whatever the number of ranks
(nccl-tests, doc/PERFORMANCE.md).

Buffers hold a pattern that is a function of rank and index, so that a chunk that arrives at the
wrong offset is found; its period is prime, and small enough for exact sums in fp32. Left out:
reduce, gather and scatter, which training does not use, and other dtypes, of which a byte costs the
same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

ELEMENT_BYTES = 4  # fp32, as nccl-tests has it unless told otherwise
_PERIOD = 251

# torch 2.13 renamed them and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Piece:
    """`length` elements of a result from `start` on, repeating `pattern` [period]."""

    start: int
    length: int
    pattern: Tensor


@dataclass(frozen=True)
class Operation:
    """One collective over n ranks and a total buffer of `elements` fp32 numbers."""

    name: str
    factor: Callable[[int], float]
    """of n: bus bandwidth over algorithm bandwidth"""
    input_sharded: bool
    """whether a rank's input is 1/n of the total buffer"""
    output_sharded: bool
    in_place: bool
    """whether the output is the input"""
    call: Callable[[Tensor, Tensor], object]
    """runs it on (output, input), over the default group"""
    expected: Callable[[int, int, int], list[Piece]]
    """of (rank, n, elements): the pieces of that rank's output"""

    def memory_bytes(self, total_bytes: int, ranks: int) -> int:
        """Device memory that one rank's buffers take."""
        source = total_bytes // ranks if self.input_sharded else total_bytes
        if self.in_place:
            return source
        return source + (total_bytes // ranks if self.output_sharded else total_bytes)

    def buffers(
        self, rank: int, ranks: int, elements: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(output, input), the input filled with `rank`'s pattern, the output with NaN."""
        source = torch.empty(elements // ranks if self.input_sharded else elements, device=device)
        if self.in_place:
            self.refill(source, source, rank)
            return source, source
        output = torch.empty(elements // ranks if self.output_sharded else elements, device=device)
        self.refill(output, source, rank)
        return output, source

    def refill(self, output: Tensor, source: Tensor, rank: int) -> None:
        """Fill the buffers as `buffers` did."""
        output.fill_(torch.nan)
        _repeat(source, pattern(rank))

    def first_error(self, output: Tensor, rank: int, ranks: int, elements: int) -> str | None:
        """Where `output` first differs from what the collective must yield; None if nowhere."""
        for piece in self.expected(rank, ranks, elements):
            found = output[piece.start : piece.start + piece.length]
            index = _first_difference(found, piece.pattern.to(output.device))
            if index is not None:
                wanted = piece.pattern[index % _PERIOD].item()
                return f"element {piece.start + index} is {found[index].item()}, not {wanted}"
        return None


def pattern(rank: int, offset: int = 0) -> Tensor:
    """What `rank` puts at positions offset, offset + 1, ...: integers in [0, 251), one period."""
    return ((torch.arange(_PERIOD) + offset) * 7 + rank * 31).remainder(_PERIOD).float()


def _summed(ranks: int, offset: int = 0) -> Tensor:
    return torch.stack([pattern(rank, offset) for rank in range(ranks)]).sum(0)


def _repeat(buffer: Tensor, period: Tensor) -> None:
    period = period.to(buffer.device)
    whole = len(buffer) // _PERIOD * _PERIOD
    buffer[:whole].view(-1, _PERIOD).copy_(period.expand(whole // _PERIOD, -1))
    buffer[whole:].copy_(period[: len(buffer) - whole])


def _first_difference(found: Tensor, period: Tensor) -> int | None:
    whole = len(found) // _PERIOD * _PERIOD
    rows, rest = found[:whole].view(-1, _PERIOD), found[whole:]
    step = 1 << 16  # 64 MiB at once: a comparison must not need as much memory as the buffers
    for row in range(0, len(rows), step):
        wrong = (rows[row : row + step] != period).flatten()
        if wrong.any():
            return row * _PERIOD + int(wrong.int().argmax())
    wrong = rest != period[: len(rest)]
    return whole + int(wrong.int().argmax()) if wrong.any() else None


def _shards(total: int, ranks: int, of: Callable[[int], Tensor]) -> list[Piece]:
    length = total // ranks
    return [Piece(source * length, length, of(source)) for source in range(ranks)]


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "all_reduce",
            lambda n: 2 * (n - 1) / n,
            input_sharded=False,
            output_sharded=False,
            in_place=True,
            call=lambda output, _: dist.all_reduce(output),
            expected=lambda rank, n, total: [Piece(0, total, _summed(n))],
        ),
        Operation(
            "reduce_scatter",
            lambda n: (n - 1) / n,
            input_sharded=False,
            output_sharded=True,
            in_place=False,
            call=_reduce_scatter,
            expected=lambda rank, n, total: [
                Piece(0, total // n, _summed(n, rank * (total // n))),
            ],
        ),
        Operation(
            "all_gather",
            lambda n: (n - 1) / n,
            input_sharded=True,
            output_sharded=False,
            in_place=False,
            call=_all_gather,
            expected=lambda rank, n, total: _shards(total, n, pattern),
        ),
        Operation(
            "all_to_all",
            lambda n: (n - 1) / n,
            input_sharded=False,
            output_sharded=False,
            in_place=False,
            call=dist.all_to_all_single,
            expected=lambda rank, n, total: _shards(
                total, n, lambda source: pattern(source, rank * (total // n))
            ),
        ),
        Operation(
            "broadcast",
            lambda n: 1.0,
            input_sharded=False,
            output_sharded=False,
            in_place=True,
            call=lambda output, _: dist.broadcast(output, 0),
            expected=lambda rank, n, total: [Piece(0, total, pattern(0))],
        ),
    )
}


def bandwidths_bytes_per_s(
    operation: str, total_bytes: int, ranks: int, seconds: float
) -> tuple[float, float]:
    """(algorithm, bus) bandwidth of moving S = `total_bytes` in `seconds`, in bytes/s."""
    algorithm = total_bytes / seconds
    return algorithm, algorithm * OPERATIONS[operation].factor(ranks)


def gloo_excess(operation: str, ranks: int) -> float:
    """Bytes that one of two or more ranks sends through gloo, over those that `factor` counts.

    torch's gloo has no reduce-scatter: it sums everything everywhere, as an all-reduce, of which
    each rank keeps its share. So its bus bandwidth is half of a link's rate where the link is full.
    Counted on the wire by tests/cluster/test_emulate.py with torch 2.13, with two ranks.
    """
    sent = "all_reduce" if operation == "reduce_scatter" else operation
    return OPERATIONS[sent].factor(ranks) / OPERATIONS[operation].factor(ranks)
