"""Which rank keeps the others waiting.

Every collective makes all ranks as slow as the slowest, so that a step takes equally long on each:
what differs is how long a rank works itself. On a CPU that is the processor time of its main thread
and the time in which that thread was ready and had no core, which includes everything but sleeping
in a collective (or on a disk). A GPU's queue says no such thing; there a product of matrices that
every rank times by itself, at each reading, says how fast the device is now, and the step's length
is scaled by it. To both comes the time until the rank had its batch, by the wall clock: readers and
disks are often what is slow. A slow network is found by neither.
"""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llama2rt.parallel import is_main, world

logger = logging.getLogger("llama2rt.train.stragglers")

# So far above the median rank at every reading for so long, a rank is worth a warning.
WORTH_SAYING = 1.2
SECONDS = 30.0
_SIZE = 2048


@dataclass(frozen=True)
class Elapsed:
    """A span of time, or a moment to measure one from."""

    wall: float
    """seconds"""
    worked: float
    """seconds in which this thread computed, or could have if it had had a core"""

    @classmethod
    def now(cls) -> "Elapsed":
        return cls(time.perf_counter(), time.thread_time() + _ready_without_a_core())

    def since(self, begin: "Elapsed") -> "Elapsed":
        return Elapsed(self.wall - begin.wall, self.worked - begin.worked)


NOTHING = Elapsed(0.0, 0.0)


class Stragglers:
    """How long this rank worked in the steps since the last reading; free in one process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps, self._wall, self._worked = 0, 0.0, 0.0
        self._slow: tuple[int, float] | None = None  # rank, since when
        self._said: set[int] = set()

    def add(self, step: Elapsed, prepared: Elapsed) -> None:
        """A step, and the part of it until this rank had its batch."""
        self._steps += 1
        self._wall += step.wall
        self._worked += prepared.wall
        if self._device.type == "cpu":
            self._worked += step.worked - prepared.worked

    def read(self) -> dict[str, float]:
        """`slowest_rank` and `straggler_ratio`, its seconds of work a step over the median rank's;
        empty in one process. Every rank calls it after the same step, and gets the same."""
        here = world()
        if here.size == 1 or not self._steps:
            return {}
        probe = _probe(self._device) if self._device.type == "cuda" else 0.0
        own = torch.tensor(
            [self._wall / self._steps, self._worked / self._steps, probe],
            dtype=torch.float64,
            device=self._device,
        )
        everyone = [torch.empty_like(own) for _ in range(here.size)]
        dist.all_gather(everyone, own)
        self._steps, self._wall, self._worked = 0, 0.0, 0.0
        walls, worked, probes = zip(*(values.tolist() for values in everyone), strict=True)
        if probe:
            usual = statistics.median_low(walls) / statistics.median_low(probes)
            worked = tuple(w + usual * p for w, p in zip(worked, probes, strict=True))
        rank, ratio = slowest(worked)
        self._warn(rank, ratio, worked)
        return {"slowest_rank": rank, "straggler_ratio": ratio}

    def _warn(self, rank: int, ratio: float, worked: Sequence[float]) -> None:
        """Say once of a rank that it is slow, when that is no accident."""
        now = time.monotonic()
        if ratio <= WORTH_SAYING:
            self._slow = None
        elif self._slow is None or self._slow[0] != rank:
            self._slow = rank, now
        elif now - self._slow[1] > SECONDS and rank not in self._said:
            self._said.add(rank)
            if is_main():
                logger.warning(
                    "rank %d keeps the others waiting: it works %.3g s a step, the median rank "
                    "%.3g s",
                    rank,
                    worked[rank],
                    statistics.median_low(worked),
                )


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """(the rank with the most seconds, those over the median rank's; of two ranks the other's)."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    return rank, seconds[rank] / max(statistics.median_low(seconds), 1e-9)


def _ready_without_a_core() -> float:
    """Seconds that this thread has waited for a processor; 0 where the kernel counts none."""
    try:
        with open("/proc/thread-self/schedstat") as counts:
            return int(counts.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _probe(device: torch.device) -> float:
    """Seconds of a product of two matrices on this GPU alone."""
    a = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ a
    begin.record()
    for _ in range(4):
        a @ a
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 4e3
