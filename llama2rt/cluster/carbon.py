"""What a training run emitted: by Llama 2's method to the digit, with the host, and as measured.

Table 2 of Touvron et al. 2023b multiplies GPU hours by the GPU's power limit, 0.385 kg CO2eq per
kWh and a PUE of 1.1, and prints two decimals, cut off and not rounded: 153.9074 is printed as
153.90, where rounding would give 153.91. The total is the sum of the uncut rows. Two more figures
stand beside it: one with the host's share of power, and the measured one, which a run without a
meter does not have (it is never 0).

Arithmetic is decimal, so that no row's last digit is changed by a binary fraction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from llama2rt.cluster.estimate import Estimate
from llama2rt.errors import InputError

KG_PER_KWH = 0.385
PUE = 1.1
METHOD = "GPU hours x power limit x PUE 1.1 x 0.385 kg/kWh (Llama 2, table 2)"
# Node wall power is 8 caps and 1.1-1.25 kW for the rest (MLPerf Inference v2.0 power results on
# an 8-GPU A100 node): this much for each GPU.
_HOST_WATTS_LOW, _HOST_WATTS_HIGH = 1100 / 8, 1250 / 8
_CENT = Decimal("0.01")
_LARGEST = 1e12  # beyond any run; products of two still have their cents in decimal arithmetic


@dataclass(frozen=True)
class Run:
    """A model's training: GPU hours at a power limit, and the GPUs' energy where a meter ran."""

    model: str
    gpu_hours: float
    watts: float
    measured_kwh: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpu_hours", "watts"):
            value = getattr(self, name)
            if not 0 < value < _LARGEST:
                raise InputError(
                    f"{name}: expected a positive number below {_LARGEST:g}, got {value:g}"
                )
        if self.measured_kwh is not None and not 0 < self.measured_kwh < _LARGEST:
            raise InputError(
                f"measured_kwh: expected a positive number below {_LARGEST:g}, got "
                f"{self.measured_kwh:g}; leave it out where no meter ran"
            )


# Touvron et al. 2023b, table 2.
LLAMA2 = (
    Run("llama2-7b", 184_320, 400),
    Run("llama2-13b", 368_640, 400),
    Run("llama2-34b", 1_038_336, 350),
    Run("llama2-70b", 1_720_320, 400),
)


def tco2eq(run: Run) -> Decimal:
    """Tonnes by the paper's method, uncut."""
    kwh = _decimal(run.gpu_hours) * _decimal(run.watts) / 1000
    return kwh * _decimal(KG_PER_KWH) * _decimal(PUE) / 1000


def floored(tonnes: Decimal) -> Decimal:
    """Two decimals, as the paper prints them."""
    return tonnes.quantize(_CENT, rounding=ROUND_FLOOR)


def total(runs: Sequence[Run]) -> Decimal:
    """Sum of the uncut rows, cut once."""
    return floored(sum((tco2eq(run) for run in runs), Decimal(0)))


def with_host(run: Run) -> Estimate:
    """Tonnes with the host's power: CPUs, memory, NICs, fans and conversion losses."""
    tonnes = float(tco2eq(run))
    low, high = (
        tonnes * (run.watts + host) / run.watts for host in (_HOST_WATTS_LOW, _HOST_WATTS_HIGH)
    )
    return Estimate((low + high) / 2, low, high, "node wall power of 8 x cap + 1.1-1.25 kW")


def measured(run: Run) -> float | None:
    """Tonnes from the GPUs' measured energy; None where no meter ran."""
    if run.measured_kwh is None:
        return None
    return run.measured_kwh * KG_PER_KWH * PUE / 1000


def line(
    gpu_hours: float | None = None, watts: float | None = None, measured_kwh: float | None = None
) -> str:
    """Carbon of a run in one line, for its report.

    gpu_hours, watts: time and power limit of its GPUs; without both the paper's method says
    nothing. measured_kwh: what a meter saw; without it the line says "not measured".
    """
    seen = "not measured"
    if measured_kwh is not None:
        seen = f"{_amount(measured_kwh * KG_PER_KWH * PUE * 1000)} CO2eq measured"
        seen += f" ({measured_kwh:.4g} kWh x PUE {PUE} x {KG_PER_KWH} kg/kWh)"
    if gpu_hours is None or watts is None:
        return seen
    run = Run("run", gpu_hours, watts, measured_kwh)
    host = with_host(run)
    return (
        f"{seen}; {_amount(float(tco2eq(run)) * 1e6)} CO2eq by the paper's method "
        f"({gpu_hours:.4g} GPU hours x {watts:g} W), {_amount(host.low * 1e6)} to "
        f"{_amount(host.high * 1e6)} with the host"
    )


def of_summary(summary: Mapping[str, object]) -> str:
    """`line` for a run whose summary may hold gpu_hours, gpu_watts and energy_kwh."""

    def number(name: str) -> float | None:
        value = summary.get(name)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        return float(value) if usable else None  # type: ignore[arg-type]

    return line(number("gpu_hours"), number("gpu_watts"), number("energy_kwh"))


def _amount(grams: float) -> str:
    for unit, size in (("t", 1e6), ("kg", 1e3)):
        if grams >= size:
            return f"{grams / size:.3g} {unit}"
    return f"{grams:.3g} g"


def _decimal(number: float) -> Decimal:
    return Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
