"""When each rank enters and leaves a collective, on one clock, and what follows from it.

A collective's time is that of its slowest rank (what nccl-tests prints with `-a 3`). Ranks on
other hosts have other clocks, so each rank's is compared with rank 0's by the round trip of
smallest delay. Half of that delay is the uncertainty; a rank is called slow only if it is later
than that. What a rank waits for inside the collective, only a profiler of the transport can tell.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

_ROUND_TRIPS = 5
_GEMM_SIZE = {"cpu": 512, "cuda": 4096}


def call_stamps(call: Callable[[], object], count: int, device: torch.device) -> Tensor:
    """Start and end of `count` calls in a row, fp64 [count, 2], in seconds of `perf_counter`.

    On a GPU these are events of the current stream, so that launches overlap as they do in
    training; the host waits once, at the end.
    """
    if device.type == "cpu":
        stamps = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            stamps.append((start, time.perf_counter()))
        return torch.tensor(stamps, dtype=torch.float64)
    zero = torch.cuda.Event(enable_timing=True)
    torch.cuda.current_stream().synchronize()
    zero.record()
    zero.synchronize()
    zero_seconds = time.perf_counter()
    events = []
    for _ in range(count):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        events.append((before, after))
    torch.cuda.current_stream().synchronize()
    elapsed = [[zero.elapsed_time(event) / 1e3 for event in pair] for pair in events]
    return torch.tensor(elapsed, dtype=torch.float64) + zero_seconds


@dataclass(frozen=True)
class Clocks:
    """Every rank's clock against rank 0's; both fields [ranks]."""

    offset_seconds: NDArray[np.float64]
    """what to subtract from a rank's clock to get rank 0's"""
    uncertainty_seconds: NDArray[np.float64]
    """how far off that may be"""


def compare_clocks(control: Any) -> Clocks | None:
    """Clocks of all ranks of the gloo group `control`, on rank 0; None on the others.

    Every rank must call it. Cristian's method: a rank's reading lies half a round trip after the
    question left.
    """
    rank, ranks = dist.get_rank(control), dist.get_world_size(control)
    reading = torch.zeros(1, dtype=torch.float64)
    if rank:
        for _ in range(_ROUND_TRIPS):
            dist.recv(reading, 0, group=control)
            reading[0] = time.perf_counter()
            dist.send(reading, 0, group=control)
        return None
    offsets, uncertainties = np.zeros(ranks), np.zeros(ranks)
    for other in range(1, ranks):
        trips = []
        for _ in range(_ROUND_TRIPS):
            asked = time.perf_counter()
            dist.send(reading, other, group=control)
            dist.recv(reading, other, group=control)
            answered = time.perf_counter()
            trips.append((answered - asked, reading.item() - (asked + answered) / 2))
        delay, offsets[other] = min(trips)
        uncertainties[other] = delay / 2
    return Clocks(offsets, uncertainties)


@dataclass(frozen=True)
class Straggler:
    """How late one rank enters and leaves, behind the first rank to do so, in seconds."""

    rank: int
    arrives_late_median: float
    arrives_late_max: float
    finishes_late_median: float


def stragglers(stamps: NDArray[np.float64], clocks: Clocks) -> tuple[list[Straggler], int | None]:
    """Each rank's lateness, and the rank that is late most, from `stamps` [ranks, calls, 2].

    The second is None where no rank's median lateness exceeds the uncertainty of the clocks.
    """
    aligned = stamps - clocks.offset_seconds[:, None, None]
    late = aligned - aligned.min(axis=0)
    medians = np.median(late, axis=1)
    rows = [
        Straggler(rank, float(medians[rank, 0]), float(late[rank, :, 0].max()), float(end))
        for rank, end in enumerate(medians[:, 1])
    ]
    slowest = int(medians[:, 0].argmax())
    # The first rank's clock counts too: lateness is a difference of two readings.
    uncertain_seconds = clocks.uncertainty_seconds[slowest] + clocks.uncertainty_seconds.max()
    return rows, slowest if medians[slowest, 0] > uncertain_seconds else None


@dataclass(frozen=True)
class Overlap:
    """Medians in seconds, alone and together, of a collective and of a matrix product."""

    collective_alone: float
    collective_together: float
    gemm_alone: float
    gemm_together: float
    gemms: int

    @property
    def collective_slowdown(self) -> float:
        return self.collective_together / self.collective_alone

    @property
    def gemm_slowdown(self) -> float:
        return self.gemm_together / self.gemm_alone


class Gemm:
    """A square matrix product on the current stream: fp32 of 512 on CPUs, bf16 of 4096 on GPUs."""

    def __init__(self, device: torch.device) -> None:
        size = _GEMM_SIZE[device.type]
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        generator = torch.Generator().manual_seed(0)
        # Random operands: products of zeros draw less power and run faster.
        self._a, self._b = (
            torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2)
        )
        self._out = torch.empty_like(self._a)

    def __call__(self) -> None:
        torch.mm(self._a, self._b, out=self._out)


def overlap(
    call: Callable[[], object], gemm: Callable[[], object], count: int, device: torch.device
) -> Overlap:
    """`count` calls of a collective alone and while matrix products run beside them.

    The products run on this thread and its stream for as long as the collectives, on a thread
    and a stream of their own, have not finished; every rank makes the same collective calls.
    """

    def median(stamps: Tensor) -> float:
        return float((stamps[:, 1] - stamps[:, 0]).median())

    gemm_alone = median(call_stamps(gemm, count, device))
    dist.barrier()
    collective_alone = median(call_stamps(call, count, device))
    together: list[Tensor] = []
    failures: list[BaseException] = []

    def communicate() -> None:
        try:
            if device.type == "cpu":
                together.append(call_stamps(call, count, device))
                return
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                together.append(call_stamps(call, count, device))
        except BaseException as error:  # raised again on the calling thread
            failures.append(error)

    dist.barrier()
    thread = threading.Thread(target=communicate, daemon=True)
    thread.start()
    beside: list[Tensor] = []
    while thread.is_alive():
        beside.append(call_stamps(gemm, 4, device))
    thread.join()
    if failures:
        raise failures[0]
    products = torch.cat(beside[:-1] or beside)  # the last ones outlived the collectives
    return Overlap(
        collective_alone, median(together[0]), gemm_alone, median(products), len(products)
    )
