"""FSDP's collectives on CPUs of one machine, through memory that its ranks share.

gloo sends by TCP inside a machine too, and its reduce-scatter is an all-reduce of a copy: together
they took 40 % of a step's time in the kernel (docs/scale.md). Here each rank lays a piece of its
part where the others read it. Pieces stay in the processor's cache on their
way, bound the memory, and alternate between two halves, so that gloo's barrier after each piece is
all the waiting there is; a rank that is missing is noticed there as in any other collective.

Left out: ranks of several machines, which keep to gloo; sums other than plain ones; tensors whose
memory is kept from block to block, which spared page faults and took 3549 MiB instead of 3288 (350M
parameters, two ranks).
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from llama2rt.parallel.world import until_stop

PIECE_BYTES = 4 << 20
"""of a rank's memory that others read; each rank has two"""


class Segments:
    """Two pieces of memory of each rank of a group, by rank; every rank reads all of them."""

    def __init__(self, memories: Sequence[Tensor], rank: int) -> None:
        self.rank, self.size = rank, len(memories)
        self.others = [other for other in range(self.size) if other != rank]
        self._memories = [memory.view(2, -1) for memory in memories]
        self._half = 0

    def turn(self) -> list[Tensor]:
        """uint8 [PIECE_BYTES] of each rank, for this rank to write its own, wait for the others and
        read theirs. What it wrote last may still be read; what it wrote before that no longer is,
        since the others have come to the barrier in between."""
        self._half = 1 - self._half
        return [memory[self._half] for memory in self._memories]


class _Allocating:
    """The part of FSDP's interface that says where a collective's tensors lie."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class SharedAllGather(_Allocating, AllGather):
    """[n] of each of N ranks -> [N n] on all."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> None:
        segments = self._segments
        own = input_tensor.view(torch.uint8)
        rows = output_tensor.view(torch.uint8).view(segments.size, -1)
        for begin in range(0, own.numel(), PIECE_BYTES):
            piece = slice(begin, begin + PIECE_BYTES)
            shared = segments.turn()
            count = own[piece].numel()
            shared[segments.rank][:count].copy_(own[piece])
            dist.barrier(group)
            for other in segments.others:
                rows[other, piece].copy_(shared[other][:count])
        if rows[segments.rank].data_ptr() != own.data_ptr():  # FSDP's input is that row
            rows[segments.rank].copy_(own)


class SharedReduceScatter(_Allocating, ReduceScatter):
    """[N n] on each of N ranks -> each its own [n] of the sum, added up in the order of ranks."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op != ReduceOp.SUM:
            raise NotImplementedError(f"reduce-scatter through shared memory: sums only, not {op}")
        segments, rank = self._segments, self._segments.rank
        rows = input_tensor.view(segments.size, -1)
        # A piece has a part for each other rank.
        width = PIECE_BYTES // rows.element_size() // len(segments.others)
        for begin in range(0, rows.shape[1], width):
            piece = slice(begin, begin + width)
            out = output_tensor[piece]
            shared = [
                memory.view(rows.dtype)[: width * len(segments.others)].view(-1, width)
                for memory in segments.turn()
            ]
            for other in segments.others:
                part = shared[rank][_slot(other, rank), : out.numel()]
                part.copy_(rows[other, piece])
            dist.barrier(group)
            terms = [
                rows[rank, piece]
                if other == rank
                else shared[other][_slot(rank, other), : out.numel()]
                for other in range(segments.size)
            ]
            torch.add(terms[0], terms[1], out=out)
            for term in terms[2:]:
                out.add_(term)


def _slot(reader: int, owner: int) -> int:
    """Which part of `owner`'s piece is for `reader`."""
    return reader - (reader > owner)


@until_stop
def segments(group: ProcessGroup) -> Segments | None:
    """The shared memory of a group of several ranks, all of which call this; None where they are
    not on one machine, or may not see each other's memory."""
    machines: list[Any] = [None] * group.size()
    dist.all_gather_object(machines, _machine(), group=group)
    if machines[0] is None or any(machine != machines[0] for machine in machines):
        return None
    descriptor = os.memfd_create("llama2rt")
    try:
        os.ftruncate(descriptor, 2 * PIECE_BYTES)
        paths: list[Any] = [None] * group.size()
        dist.all_gather_object(paths, f"/proc/{os.getpid()}/fd/{descriptor}", group=group)
        try:
            memories = [_opened(path) for path in paths]
        except OSError:
            memories = []
        seen: list[Any] = [None] * group.size()
        dist.all_gather_object(seen, bool(memories), group=group)
    finally:
        os.close(descriptor)
    return Segments(memories, group.rank()) if all(seen) else None


def _machine() -> tuple[str, int] | None:
    """What processes that find each other in /proc have in common; None where there is no such."""
    if not hasattr(os, "memfd_create"):
        return None
    booted = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return booted, Path("/proc/self/ns/pid").stat().st_ino


def _opened(path: str) -> Tensor:
    """uint8 [2 PIECE_BYTES] that begins with zeros; what one process writes the others read."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(descriptor, 2 * PIECE_BYTES)
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)
