"""Contenders of one op timed side by side, as parts of what the machine itself can do.

A set-up function makes the contenders of a case; the same ones are timed and weighed, so that speed
and memory speak of the same call. Each round runs the ceiling and then every contender once, so
that all see the same machine; figures are medians and ratios of medians. The ceiling (a copy or a
matrix product) is measured alone before and after: if it moved by more than a tenth the machine was
not quiet, the measurement is thrown away and repeated, and after three the benchmark fails. On a
CPU rounds go on for seconds, since neighbours on the same memory come and go in tenths of them.

Energy is metered in a stretch of its own, one a contender, since counters need longer than a round.
Where no counter can be read nothing is run for it, and the record says why.

CPU: wall clock, torch's threads, malloc keeps its memory (both sides, as in training). GPU: events
around calls whose launches are hidden behind a wait, inputs that rotate through more memory than
the L2 cache has. Data is random, never zeros.

BENCH_SMOKE=1 runs everything once at sizes that measure nothing: it shows that benchmarks work.
"""

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The profiler that counts memory reports each start and stop on stderr, unless told before torch.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import pytest
import records
import targets
import torch
from memory import peak_extra_bytes
from torch import Tensor

from llama2rt import energy, ops

SMOKE = os.environ.get("BENCH_SMOKE") == "1"
DEVICES = ("cpu", "cuda")
ROUNDS = 1 if SMOKE else 7  # at least
EDGE_ROUNDS = 1 if SMOKE else 5  # at least, of the ceiling alone, before and after
# Rounds go on until they have lasted this long, the ceiling's alone for a tenth of it.
SPAN_SECONDS = {"cpu": 0.0 if SMOKE else 3.0, "cuda": 0.0}
DRIFT, ATTEMPTS = 0.10, 3
# A sample lasts at least this long: far above the clock's grain and an event's.
LEAST_SECONDS = {"cpu": 2e-3, "cuda": 2e-4}
OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
OWN = {"cpu", "cuda", "triton", "ours"}  # names of our contenders

Function = Callable[..., Tensor | tuple[Tensor, ...] | list[Tensor]]


@dataclass(frozen=True)
class Contender:
    function: Function
    inputs: tuple[Tensor, ...]
    """What it takes, and is differentiated by."""
    upstream: tuple[Tensor | None, ...] = ()
    """A gradient for each of its outputs; None for 1, of a scalar."""

    def forward(self) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return self.function(*self.inputs)

        return run

    def _leaves(self) -> list[Tensor]:
        # Copies: some peers write gradients over what they saved.
        return [x.detach().clone().requires_grad_() for x in self.inputs]

    def backward(self) -> Callable[[], Any]:
        leaves = self._leaves()
        out = self.function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self.upstream, retain_graph=True)

    def both(self) -> Callable[[], Any]:
        leaves = self._leaves()
        return lambda: torch.autograd.grad(self.function(*leaves), leaves, self.upstream)


DIRECTIONS = {
    "forward": Contender.forward,
    "backward": Contender.backward,
    "forward + backward": Contender.both,
    "step": Contender.forward,  # of an optimizer
}


@dataclass(frozen=True)
class SetUp:
    """What a set-up function returns: the ceiling and the contenders, ours by backend's name."""

    ceiling: Callable[[], Any]
    contenders: dict[str, Contender]


@dataclass(frozen=True)
class Case:
    op: str
    direction: str
    device: str
    size: str
    """The shape, for people."""
    x: float
    """The same on the axis of a figure: bytes moved, or tokens."""
    axis: str
    work: float
    """Useful bytes or FLOPs of one call."""
    unit: str
    ceiling: str
    """What the ceiling is, for people."""
    ceiling_work: float
    set_up: Callable[[], SetUp]
    input_bytes: int
    on_curve: bool = True
    """Whether a figure's lines go through it: the cases of a line differ in size alone."""
    judged: bool = True
    """Whether the targets speak of this size."""
    limit_bytes: int = 0
    """What a target for memory is a share of: all logits, say."""


def ours_for(op: str, device: str) -> list[str]:
    """Backends with a kernel of their own for `op`; a skip where there are none."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no usable NVIDIA GPU")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("a machine with a GPU measures its GPU")
    native = ops.backends(device)[op]["native"]
    found = [name for name in OURS[device] if name in native]
    if not found:
        pytest.skip(f"no kernel of our own for {op} on {device}")
    return found


@functools.cache
def inductor(function: Function) -> Function:
    # In smoke mode the graph is taken and differentiated, but no C++ compiled.
    return torch.compile(function, dynamic=False, backend="aot_eager" if SMOKE else "inductor")


def on(backend: str, function: Function) -> Function:
    """`function`, which calls ops, on a backend of ours."""

    def call(*arguments: Tensor) -> Any:
        with ops.use(backend):
            return function(*arguments)

    return call


def seconds(run: Callable[[], Any], device: str, loops: int = 1) -> float:
    """Of one call, over `loops` of them."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is kept busy while the host gets its launches ready: they are not timed.
        torch.cuda._sleep(4_000_000)
        start.record()
        for _ in range(loops):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / loops
    started = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - started) / loops


@dataclass(frozen=True)
class Calls:
    ceiling: Callable[[], Any]
    contenders: dict[str, Callable[[], Any]]
    left_out: dict[str, str]
    """Peers that cannot do this case (a shape they refuse, memory), with their words."""


def rotating(case: Case) -> Calls:
    """The case's calls, each run once. On a GPU each goes round enough set-ups to leave the cache.

    The first run compiles, warms up and makes oneDNN's kernels; ours must survive it.
    """
    sets = 1
    if case.device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        sets = min(16, 1 + 2 * cache // max(1, case.input_bytes))
    made = [case.set_up() for _ in range(sets)]

    def turning(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
        turn = itertools.cycle(runs)
        return lambda: next(turn)()

    prepare = DIRECTIONS[case.direction]
    calls, left_out = {}, {}
    for name in made[0].contenders:
        try:
            calls[name] = turning([prepare(one.contenders[name]) for one in made])
            calls[name]()
        except Exception as error:
            if name in OWN:
                raise
            calls.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {error}"
    ceiling = turning([one.ceiling for one in made])
    ceiling()
    return Calls(ceiling, calls, left_out)


def extra_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory held at once during `run()` beyond its inputs and results."""

    def results() -> tuple[Tensor, ...]:
        found = run()
        return (found,) if isinstance(found, Tensor) else tuple(found)

    if device == "cpu":
        return max(0, peak_extra_bytes(results))  # below 0: a result counted twice
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = sum(x.nbytes for x in results())
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - returned)


def energy_of(
    run: Callable[[], Any], device: str, call_seconds: float
) -> tuple[int, energy.Energy]:
    """Calls made, and what they drew, over a stretch that every counter here resolves."""
    with energy.of_device(torch.device(device)) as meter:
        # Half as long again: calls back to back are faster than calls in turn.
        needed = 1.5 * meter.peek().seconds_needed
        calls = 1 if SMOKE and needed else math.ceil(needed / call_seconds)
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    return calls, meter.energy


def rounds(
    runs: dict[str, Callable[[], Any]], device: str, loops: dict[str, int], least: int, span: float
) -> dict[str, list[float]]:
    """Seconds of a call of each in every round: `least` rounds, and on until they fill `span` s."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    started, made = time.perf_counter(), 0
    while made < least or time.perf_counter() - started < span:
        for name, run in runs.items():
            times[name].append(seconds(run, device, loops[name]))
        made += 1
    return times


def median_seconds(run: Callable[[], Any], device: str, loops: int) -> float:
    span = SPAN_SECONDS[device] / 10
    found = rounds({"alone": run}, device, {"alone": loops}, EDGE_ROUNDS, span)
    return statistics.median(found["alone"])


def measured(case: Case) -> dict[str, Any]:
    """One measurement: times, rates, shares of the ceiling, memory, drift of the ceiling."""
    made = rotating(case)
    ceiling, runs = made.ceiling, {"ceiling": made.ceiling, **made.contenders}
    loops = {}
    for name, run in runs.items():
        once = seconds(run, case.device)
        loops[name] = 1 if SMOKE else max(1, min(100, int(LEAST_SECONDS[case.device] / once)))
    before = median_seconds(ceiling, case.device, loops["ceiling"])
    times = rounds(runs, case.device, loops, ROUNDS, SPAN_SECONDS[case.device])
    after = median_seconds(ceiling, case.device, loops["ceiling"])
    median = {name: statistics.median(values) for name, values in times.items()}
    drawn = {
        name: energy_of(run, case.device, median[name]) for name, run in made.contenders.items()
    }
    ceiling_rate = case.ceiling_work / median["ceiling"]
    return {
        "drift": abs(after / before - 1),
        "rounds": len(times["ceiling"]),
        "ceiling_rate": ceiling_rate,
        "rows": {
            name: {
                "seconds": median[name],
                "rate": case.work / median[name],
                "percent_of_ceiling": 100 * case.work / median[name] / ceiling_rate,
                "extra_bytes": extra_bytes(run, case.device),
                "joules_per_call": drawn[name][1].joules_per(drawn[name][0]),
            }
            for name, run in made.contenders.items()
        },
        "left_out": made.left_out,
        "energy_not_measured": {
            device: why for _, used in drawn.values() for device, why in used.not_measured.items()
        },
    }


def quiet(case: Case) -> dict[str, Any]:
    """`measured`, until the machine held still."""
    for attempt in range(1, ATTEMPTS + 1):
        result = measured(case)
        if SMOKE or result["drift"] <= DRIFT:
            return result | {"attempts": attempt}
        print(
            f"\n{case.op}: the ceiling moved by {result['drift']:.0%}, measured again", flush=True
        )
    pytest.fail(
        f"{case.op} {case.direction} {case.size}: the ceiling moved by {result['drift']:.0%}, even "
        f"in measurement {ATTEMPTS}: the machine is not quiet, nothing was recorded"
    )


def compare(benchmark: Any, capsys: Any, case: Case, ours: list[str]) -> None:
    """Measure, print the table with its targets, and add it to the records."""
    if case.device == "cpu":
        # Here, because it pulls in pydantic, which a machine rented for its GPU may lack.
        from llama2rt.train.allocator import keep_freed_memory

        keep_freed_memory()
    torch._dynamo.reset()
    with capsys.disabled():
        result = benchmark.pedantic(quiet, args=(case,), rounds=1)
        for name in ours:
            result["rows"][name]["ratio"] = {
                peer: row["seconds"] / result["rows"][name]["seconds"]
                for peer, row in result["rows"].items()
                if peer not in ours
            }
            result["rows"][name]["targets"] = targets.judge(case, name, result["rows"])
        benchmark.extra_info.update(result)
        print("\n" + table(case, result, ours), flush=True)
    records.add(case, result, ours)


def table(case: Case, result: dict[str, Any], ours: list[str]) -> str:
    scale, unit = (1e9, "GB/s") if case.unit == "bytes" else (1e12, "TFLOP/s")
    lines = [
        f"{case.op} {case.direction}, {case.size}, on {case.device}: {case.ceiling} at "
        f"{result['ceiling_rate'] / scale:.3g} {unit}, moved by {result['drift']:.0%}"
    ]
    for name, row in result["rows"].items():
        text = (
            f"  {'*' if name in ours else ' '} {name:<12}{1e3 * row['seconds']:10.3f} ms"
            f"{row['rate'] / scale:9.3g} {unit} {row['percent_of_ceiling']:5.0f} %"
            f"  memory +{row['extra_bytes'] / 2**20:.1f} MiB"
        )
        if row["joules_per_call"] is not None:
            text += f"  {1e3 * row['joules_per_call']:.3g} mJ"
        if name in ours:
            text += "  " + ", ".join(f"{x:.2f}x {peer}" for peer, x in row["ratio"].items())
        lines.append(text)
        for target in row.get("targets", []):
            verdict = "met" if target["met"] else "MISSED"
            lines.append(f"      target {target['target']}: {target['got']:.3g}, {verdict}")
    lines += [f"    {name} left out: {why[:200]}" for name, why in result["left_out"].items()]
    missing = result["energy_not_measured"].items()
    lines += [f"    energy not measured, {name}: {why}" for name, why in missing]
    return "\n".join(lines)
