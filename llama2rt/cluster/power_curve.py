"""What a power cap costs: throughput of a GPU held below the power its work would draw.

The shape P = P0 + (P1 - P0) r (1 - s (1 - r))^2, r the relative throughput, has the form of
dynamic power (frequency times voltage squared) over a floor P0. Constants are fits to A100-SXM-80GB
results at capped power in MLPerf Inference v2.0. No public sweep of LLM training at 350 W exists:
for training, the matrix-bound curve gives the value and the mixed curve the other end of the range.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from llama2rt.cluster.estimate import Estimate
from llama2rt.cluster.hardware import GPUS, Gpu
from llama2rt.errors import InputError

Workload = Literal["matmul", "mixed", "memory"]
WORKLOADS: tuple[Workload, ...] = get_args(Workload)
NO_SWEEP = "No public sweep of LLM training at 350 W exists."
_A100_WATTS = 400.0
_LEAST_FITTED_WATTS = 225.0


@dataclass(frozen=True)
class Curve:
    """Power against throughput of one kind of work."""

    floor_watts: float
    """P0: the power at a throughput of 0"""
    steepness: float
    """s: how fast power falls with throughput"""
    draw_watts: float
    """P1: what the work draws when nothing caps it"""
    source: str

    def watts(self, relative: float) -> float:
        """Power at a relative throughput in [0, 1]."""
        dynamic = relative * max(0.0, 1 - self.steepness * (1 - relative)) ** 2
        return self.floor_watts + (self.draw_watts - self.floor_watts) * dynamic

    def relative(self, cap_watts: float) -> float:
        """Relative throughput under a cap: 1 where the work draws less than the cap.

        Found by bisection; the curve rises on the branch from r = 1 - 1/s to 1.
        """
        if cap_watts >= self.draw_watts:
            return 1.0
        low, high = max(0.0, 1 - 1 / self.steepness), 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.watts(middle) < cap_watts else (low, middle)
        return (low + high) / 2


_MLPERF = "fit to MLPerf Inference v2.0, A100-SXM-80GB x8 under caps of 225-400 W"
MATMUL = Curve(130.0, 1.10, _A100_WATTS, f"matrix-bound {_MLPERF}")
MIXED = Curve(40.0, 1.14, _A100_WATTS, f"mixed {_MLPERF}")
# Memory-bound kernels keep most of the chip idle. Their draw has no public sweep either.
MEMORY = Curve(130.0, 1.10, 270.0, "assumption: draws 270 W (240-300 W), matrix-bound shape")
_MEMORY_RANGE = (300.0, 240.0)


def _scaled(curve: Curve, gpu: Gpu) -> Curve:
    """An A100's curve on another GPU, every power in proportion to the largest cap."""
    factor = gpu.max_watts / _A100_WATTS
    return Curve(
        curve.floor_watts * factor, curve.steepness, curve.draw_watts * factor, curve.source
    )


def relative_throughput(workload: Workload, watts: float, gpu: Gpu = GPUS["a100-80gb"]) -> Estimate:
    """Throughput under a cap of `watts` over that at the largest cap, with its range.

    The range of matmul and of mixed ends at the other of the two; that of memory spans the assumed
    draw. InputError for a cap that the GPU does not take.
    """
    if workload not in WORKLOADS:
        raise InputError(f"workload: expected one of {', '.join(WORKLOADS)}, got {workload!r}")
    if not gpu.min_watts <= watts <= gpu.max_watts:
        raise InputError(
            f"watts: {gpu.name} takes caps of {gpu.min_watts:g}-{gpu.max_watts:g} W, got {watts:g}"
        )
    curves = {"matmul": MATMUL, "mixed": MIXED, "memory": MEMORY}
    curve = curves[workload]
    if workload == "memory":
        ends = [
            Curve(MEMORY.floor_watts, MEMORY.steepness, draw, MEMORY.source)
            for draw in _MEMORY_RANGE
        ]
    else:
        ends = [MATMUL, MIXED]
    values = [_scaled(end, gpu).relative(watts) for end in ends]
    value = _scaled(curve, gpu).relative(watts)
    return Estimate(
        value, min(value, *values), max(value, *values), curve.source + _stretched(watts, gpu)
    )


def _stretched(watts: float, gpu: Gpu) -> str:
    """How far a cap lies from what the fit has seen."""
    scale = gpu.max_watts / _A100_WATTS
    words = f"; scaled to {gpu.max_watts:g} W" if scale != 1 else ""
    if watts < _LEAST_FITTED_WATTS * scale:
        words += f"; extrapolated below {_LEAST_FITTED_WATTS * scale:g} W"
    return words


def draw_watts(workload: Workload, watts: float, gpu: Gpu = GPUS["a100-80gb"]) -> float:
    """Power drawn under a cap: the cap, or less where the work wants less."""
    curve = {"matmul": MATMUL, "mixed": MIXED, "memory": MEMORY}[workload]
    return min(watts, _scaled(curve, gpu).draw_watts)
