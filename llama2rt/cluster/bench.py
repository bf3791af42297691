"""`llama2rt cluster bench`: collectives measured under torchrun, size by size.

Each size is checked against what the collective must yield, before and after it is timed, and is on
disk before the next one starts: Ctrl-C, a rank that dies or a kill leave every finished row.
Bus bandwidth is that of nccl-tests (see `operations`), the time of a call that of its slowest rank.
Sizes that do not fit into free memory are listed as skipped.
"""

import contextlib
import datetime
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from llama2rt import energy
from llama2rt.cluster import bench_output, host, presets, records, timing
from llama2rt.cluster.operations import ELEMENT_BYTES, OPERATIONS, Operation
from llama2rt.cluster.sizes import bytes_text, parse_bytes
from llama2rt.errors import InputError
from llama2rt.memory import free_bytes

Name = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]

FEWEST_WARMUP, FEWEST_ITERATIONS = 5, 20
_DEFAULT_OUT = Path("cluster-bench.json")


def bench(
    *,
    ops: tuple[Name, ...] = (
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "all_to_all",
        "broadcast",
    ),
    min_bytes: Annotated[str, tyro.conf.arg(aliases=["--min"])] = "8B",
    max_bytes: Annotated[str, tyro.conf.arg(aliases=["--max"])] = "8GiB",
    warmup: int = FEWEST_WARMUP,
    iterations: int = FEWEST_ITERATIONS,
    backend: Literal["nccl", "gloo"] | None = None,
    preset: presets.Fabric | None = None,
    overlap: bool = False,
    timeout_seconds: float = 600.0,
    out: Path | None = None,
    compare: tuple[Path, Path] | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure collectives: torchrun --no-python --nproc-per-node N llama2rt cluster bench.

    Prints time and bus bandwidth (as nccl-tests defines them) per operation and size, and which
    rank is late; writes OUT (JSON) and a figure beside it.

    Args:
        ops: Operations to measure.
        min_bytes: First size of the total buffer: 8B, 4KiB, 1MiB, 2GB ... (KiB is 1024, KB 1000).
        max_bytes: Last size; sizes double. (torchrun takes --max for an option of its own.)
        warmup: Calls before the timed ones, at least 5.
        iterations: Timed calls, at least 20.
        backend: None for nccl where there is a GPU, else gloo.
        preset: Set and print NCCL's environment for InfiniBand, RoCE or plain TCP.
        overlap: Also run each size while matrix products run, and say what both lose.
        timeout_seconds: How long a call may wait for a rank that does not come.
        out: Where the record goes, after each size, and the figure as .png; cluster-bench.json.
        compare: Compare two recorded runs instead: the ratio at each size with its interval; with
            --out also a file of it and both runs in one figure.
        as_json: Print one JSON object.
    """
    if compare is not None:
        both = [records.read(path) for path in compare]
        result = records.compare(*both)
        if out is not None:
            records.write(result, out)
            bench_output.draw(both, out.with_suffix(".png"))
        print(json.dumps(result) if as_json else bench_output.comparison(result))
        return
    plan = Plan.of(ops, min_bytes, max_bytes, warmup, iterations, overlap)
    if "RANK" not in os.environ:
        raise InputError(
            "collectives need several processes, and this is one; start it with torchrun:\n"
            "  torchrun --standalone --no-python --nproc-per-node 8 llama2rt cluster bench\n"
            "on several hosts, on each of them:\n"
            "  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "
            "HOST:29500 \\\n    --no-python llama2rt cluster bench"
        )
    _run(plan, backend, preset, timeout_seconds, out or _DEFAULT_OUT, as_json)


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    """in bytes of the total buffer"""
    warmup: int
    iterations: int
    overlap: bool

    @classmethod
    def of(
        cls,
        operations: Sequence[str],
        smallest: str,
        largest: str,
        warmup: int,
        iterations: int,
        overlap: bool = False,
    ) -> "Plan":
        """InputError for an empty range or too few calls for a median."""
        first, last = parse_bytes(smallest), parse_bytes(largest)
        if first < ELEMENT_BYTES or last < first:
            raise InputError(f"--min {smallest} --max {largest}: expected 4B <= min <= max")
        if warmup < FEWEST_WARMUP or iterations < FEWEST_ITERATIONS:
            raise InputError(
                f"--warmup {warmup} --iterations {iterations}: expected at least "
                f"{FEWEST_WARMUP} and {FEWEST_ITERATIONS}"
            )
        doublings = (last // first).bit_length()
        sizes = tuple(first << k for k in range(doublings))
        return cls(tuple(dict.fromkeys(operations)), sizes, warmup, iterations, overlap)


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    ranks: int
    device: torch.device
    control: Any
    """a gloo group for everything that is not timed"""

    def worst(self, value: float) -> float:
        """The largest `value` of all ranks."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.item()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on rank 0; the others get an empty list."""
        values: list[Any] | None = [None] * self.ranks if self.rank == 0 else None
        dist.gather_object(value, values, 0, group=self.control)
        return values or []


def measure(
    ranks: Ranks, operation: Operation, total_bytes: int, plan: Plan, meter: energy.EnergyMeter
) -> dict[str, Any]:
    """One row of the record: `operation` over `total_bytes`, checked and timed.

    Every rank must call it; rank 0 gets the row, the others an empty one. {"skipped": reason} where
    the size does not divide or fit. OSError where a rank got a wrong result.
    """
    elements = total_bytes // ELEMENT_BYTES // ranks.ranks * ranks.ranks
    if elements == 0:
        return {"skipped": f"less than one fp32 number for each of {ranks.ranks} ranks"}
    needed = operation.memory_bytes(elements * ELEMENT_BYTES, ranks.ranks)
    free = -ranks.worst(-free_bytes(ranks.device))
    if needed * 1.1 > free:  # the check and the backend need some, too
        wanted, there = bytes_text(needed), bytes_text(int(free))
        return {"skipped": f"a rank's buffers take {wanted}, {there} are free"}
    output, source = operation.buffers(ranks.rank, ranks.ranks, elements, ranks.device)

    def call() -> object:
        return operation.call(output, source)

    _check(ranks, operation, output, source, elements)
    timing.call_stamps(call, plan.warmup, ranks.device)
    dist.barrier(group=ranks.control)
    meter.lap()
    stamps = timing.call_stamps(call, plan.iterations, ranks.device)
    used = meter.lap()
    operation.refill(output, source, ranks.rank)
    _check(ranks, operation, output, source, elements)
    together = (
        timing.overlap(call, timing.Gemm(ranks.device), plan.iterations, ranks.device)
        if (plan.overlap)
        else None
    )
    clocks = timing.compare_clocks(ranks.control)
    gathered = ranks.gather((stamps, used, together))
    if clocks is None:
        return {}
    return records.row(
        operation.name,
        elements * ELEMENT_BYTES,
        torch.stack([stamps for stamps, *_ in gathered]).numpy(),
        clocks,
        [used for _, used, _ in gathered],
        [together for *_, together in gathered if together is not None],
    )


def _check(
    ranks: Ranks, operation: Operation, output: Tensor, source: Tensor, elements: int
) -> None:
    operation.call(output, source)
    wrong = operation.first_error(output, ranks.rank, ranks.ranks, elements)
    if wrong is not None:
        print(f"rank {ranks.rank}: {operation.name}: {wrong}", file=sys.stderr)
    if ranks.worst(wrong is not None):
        raise OSError(
            f"{operation.name} of {bytes_text(elements * ELEMENT_BYTES)} gave a wrong "
            "result (the ranks concerned say where); nothing is reported for it"
        )


def _run(
    plan: Plan,
    backend: str | None,
    preset: presets.Fabric | None,
    timeout_seconds: float,
    out: Path,
    as_json: bool,
) -> None:
    lines = presets.apply(presets.settings(preset), os.environ) if preset else []
    first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"  # the others would count it again
    with (
        _group(backend, timeout_seconds) as ranks,
        energy.of_device(ranks.device, host=first_of_host) as meter,
    ):
        footer = host.footer(ranks.gather(host.facts(ranks.device)))
        record = records.new(plan.warmup, plan.iterations, dist.get_backend(), ranks.ranks, footer)
        record |= {"preset": preset, "environment": records.nccl_environment(os.environ)}
        report = _Report(record, out, quiet=ranks.rank != 0, stream=sys.stderr if as_json else None)
        report.say(*lines, *bench_output.head(record))
        try:
            _all_rows(ranks, plan, meter, report)
        except (KeyboardInterrupt, RuntimeError) as error:
            interrupted = isinstance(error, KeyboardInterrupt) or bool(_received)
            for number in _SIGNALS:  # nothing may cut short what is left to say and to write
                signal.signal(number, signal.SIG_IGN)
            why = "interrupted" if interrupted else _lost(error)
            report.stop(why)
            kind = KeyboardInterrupt if interrupted else ConnectionError
            raise kind(_stopped(ranks, why, report)) from None
        report.finish()
        if as_json and ranks.rank == 0:
            print(json.dumps(record))


def _all_rows(ranks: Ranks, plan: Plan, meter: energy.EnergyMeter, report: "_Report") -> None:
    for name in plan.operations:
        for size in plan.sizes:
            try:
                report.add(name, size, measure(ranks, OPERATIONS[name], size, plan, meter))
            except RuntimeError as error:  # NotImplementedError is one, too
                if not (isinstance(error, NotImplementedError) or "not support" in str(error)):
                    raise
                report.add(name, size, {"skipped": f"{dist.get_backend()}: {error}"})


class _Report:
    """The record on disk and on the screen; silent on every rank but the first."""

    def __init__(
        self, record: dict[str, Any], out: Path, *, quiet: bool, stream: Any = None
    ) -> None:
        self.record, self.out, self._quiet = record, out, quiet
        self._stream = stream or sys.stdout

    def say(self, *lines: str) -> None:
        if not self._quiet:
            for line in lines:
                print(line, file=self._stream, flush=True)

    def add(self, name: str, size: int, row: dict[str, Any]) -> None:
        if self._quiet:
            return
        if "skipped" in row:
            self.record["skipped"].append({"op": name, "bytes": size, "reason": row["skipped"]})
        else:
            self.record["rows"].append(row)
        self.say(bench_output.line(name, size, row))
        records.write(self.record, self.out)

    def stop(self, reason: str) -> None:
        self.record["stopped"] = reason
        self._end()

    def finish(self) -> None:
        self.record["complete"] = True
        self._end()

    def _end(self) -> None:
        if self._quiet:
            return
        records.write(self.record, self.out)
        figure = bench_output.draw([self.record], self.out.with_suffix(".png"))
        self.say(*bench_output.foot(self.record), f"record: {self.out}")
        if figure is not None:
            self.say(f"figure: {figure}")


def _lost(error: BaseException) -> str:
    """The likely meaning of a failed call of torch.distributed, which is always a RuntimeError."""
    # gloo's messages begin with a line of its sources and end with advice.
    first = re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]
    return f"a collective failed, most likely because another rank is gone ({first})"


def _stopped(ranks: Ranks, why: str, report: _Report) -> str:
    if ranks.rank:
        return f"rank {ranks.rank}: {why}"
    done = len(report.record["rows"])
    return f"rank 0: {why}; the {done} finished rows are in {report.out}"


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


@contextlib.contextmanager
def _group(backend: str | None, timeout_seconds: float) -> Iterator[Ranks]:
    """The process group of torchrun's environment, with SIGTERM (torchrun's way to stop its
    processes) acting as Ctrl-C does."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl":
        if torch.cuda.device_count() <= local_rank:
            raise InputError(
                f"nccl needs a GPU for each process: rank {local_rank} of this host has none "
                f"({torch.cuda.device_count()} found); --backend gloo runs on CPUs"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    _received.clear()
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    dist.init_process_group(
        backend, timeout=timeout, device_id=device if device.type == "cuda" else None
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    # Neither of these after an error: the first would wait for ranks that are gone, and after the
    # second torchrun's SIGTERM would silence the reason.
    dist.destroy_process_group()
    for number, handler in before.items():
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A terminal's Ctrl-C arrives twice under torchrun, which passes it on: the second must not
    # interrupt what the first began.
    _received.append(number)
    if len(_received) == 1:
        raise KeyboardInterrupt
