"""`llama2rt cluster power-sweep`: throughput and energy of two workloads against the power cap.

A matrix product stands for work that arithmetic bounds, a copy for work that memory bounds;
training lies between the two. Caps are changed only when some are given, after all of them were
found legal. The GPU gets its old cap back however the sweep ends, except by SIGKILL, after which
`nvidia-smi -pl` must restore it. Where no sweep can run, `cluster power` estimates its result.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import tyro

from llama2rt import atomic, energy
from llama2rt.cluster import host
from llama2rt.errors import InputError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MATRIX, _COPY_BYTES = 8192, 1 << 30
_SETTLE_SECONDS = 2.0  # a new cap acts within tens of milliseconds, temperature takes longer


def power_sweep(
    *,
    caps_watts: Annotated[tuple[float, ...], tyro.conf.arg(name="caps")] = (),
    seconds: float = 10.0,
    out: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Throughput and joules of a matrix product and a copy on this GPU, under power caps.

    Without --caps nothing is changed, and one row a workload shows what the present cap gives.

    Args:
        caps: Power caps in watts to set one after the other (root only); restored at the end.
        seconds: Time measured for each row, at least 1 (energy counters are slow).
        out: Also write the result to this file.
        as_json: Print one JSON object.
    """
    if not torch.cuda.is_available():
        raise InputError("power-sweep measures an NVIDIA GPU, and torch finds none here")
    if seconds < 1:
        raise InputError(f"--seconds {seconds:g}: expected at least 1")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = sweep(energy.gpu_uuid(device), workloads(device), caps_watts, seconds)
    result = {
        "what": "llama2rt cluster power-sweep",
        "device": torch.cuda.get_device_name(device),
        "versions": host.versions(),
        "seconds": seconds,
        "rows": rows,
    }
    if out is not None:
        atomic.write(out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if as_json else "\n".join(describe(rows)))


Workload = tuple[Callable[[], None], float, str]
"""(work that ends when it has been done, units of it in one call, their name)"""


def workloads(device: torch.device) -> dict[str, Workload]:
    """A bf16 matrix product of 8192 and a copy of 1 GiB, on random data, some calls at a time."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device).bfloat16() for _ in range(2))
    source = torch.randn(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)

    def matmul() -> None:
        for _ in range(10):
            a @ b
        torch.cuda.synchronize(device)

    def copy() -> None:
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize(device)

    return {
        "matmul": (matmul, 10 * 2 * _MATRIX**3, "FLOP"),
        "copy": (copy, 10 * 2 * _COPY_BYTES, "bytes"),
    }


def sweep(
    gpu: str,
    work: dict[str, Workload],
    caps_watts: Sequence[float],
    seconds: float,
    *,
    settle_seconds: float = _SETTLE_SECONDS,
) -> list[dict[str, Any]]:
    """One row a cap and workload: throughput, watts, joules a unit; `gpu` is NVML's UUID.

    With no caps, the present one. relative_throughput is against the highest cap. Numbers that
    were not measured are None and the row says why. InputError for a cap outside the GPU's range,
    OSError where NVML is missing or does not let caps be set.
    """
    rows: list[dict[str, Any]] = []
    with _power_cap(gpu, caps_watts) as set_watts:
        for cap in sorted(caps_watts, reverse=True) or (None,):
            present = set_watts(cap)
            for name, workload in work.items():
                _repeat(workload[0], settle_seconds)
                rows.append({"cap_watts": present, "workload": name} | _row(gpu, workload, seconds))
    for row in rows:
        first = next(other for other in rows if other["workload"] == row["workload"])
        row["relative_throughput"] = row["units_per_second"] / first["units_per_second"]
    return rows


def _row(gpu: str, workload: Workload, seconds: float) -> dict[str, Any]:
    call, units, unit = workload
    with energy.EnergyMeter([gpu], host=False) as meter:
        calls, elapsed = _repeat(call, seconds)
    joules = meter.energy.total_joules
    return {
        "unit": unit,
        "units_per_second": calls * units / elapsed,
        "watts": None if joules is None else joules / meter.energy.seconds,
        "joules_per_unit": meter.energy.joules_per(calls * units),
        "energy": meter.energy.record(),
    }


def _repeat(call: Callable[[], None], seconds: float) -> tuple[int, float]:
    """(calls, seconds) of calling until `seconds` have passed, at least once."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls, time.perf_counter() - start


@contextlib.contextmanager
def _power_cap(gpu: str, caps_watts: Sequence[float]) -> Iterator[Callable[[float | None], float]]:
    """A function that sets the cap (None: leaves it) and returns the one in force, in watts."""
    nvml = energy.nvml_module()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu)
        before = nvml.nvmlDeviceGetPowerManagementLimit(handle)
        lowest, highest = nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
    except nvml.NVMLError as error:
        raise OSError(f"{gpu} does not tell its power cap: {error}") from None
    for cap in caps_watts:
        if not lowest <= round(cap * 1e3) <= highest:
            raise InputError(
                f"--caps {cap:g}: this GPU takes {lowest / 1e3:g} to {highest / 1e3:g} W"
            )

    changed = False

    def set_watts(cap: float | None) -> float:
        nonlocal changed
        if cap is not None:
            changed = True
            nvml.nvmlDeviceSetPowerManagementLimit(handle, round(cap * 1e3))
        return nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3

    handlers = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield set_watts
    except nvml.NVMLError as error:
        raise OSError(f"the power cap of {gpu} cannot be set: {error} (only root may)") from None
    finally:
        for number in _SIGNALS:  # a second Ctrl-C must not keep the old cap from coming back
            signal.signal(number, signal.SIG_IGN)
        try:
            if changed:
                _restore(nvml, handle, before)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _restore(nvml: Any, handle: Any, milliwatts: int) -> None:
    try:
        # Equal where the driver refused the first change; then it would refuse this one, too.
        if nvml.nvmlDeviceGetPowerManagementLimit(handle) != milliwatts:
            nvml.nvmlDeviceSetPowerManagementLimit(handle, milliwatts)
    except nvml.NVMLError as error:
        raise OSError(
            f"the old power cap could not be restored ({error}): "
            f"nvidia-smi --power-limit={milliwatts / 1e3:g}"
        ) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}; the power cap is restored")


def describe(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table: cap, workload, throughput absolute and relative, watts, joules a unit."""
    scale = {"FLOP": (1e12, "TFLOP/s"), "bytes": (1e9, "GB/s")}
    lines = []
    for row in rows:
        size, name = scale[row["unit"]]
        rate = f"{row['units_per_second'] / size:8.1f} {name}"
        text = f"{row['cap_watts']:6.0f} W  {row['workload']:<8}{rate:<20}"
        text += f"{row['relative_throughput']:6.3f}"
        if row["watts"] is None:
            reasons = "; ".join(row["energy"]["not_measured"].values())
            lines.append(f"{text}  energy not measured: {reasons}")
        else:
            per = row["joules_per_unit"] * size
            lines.append(f"{text}  {row['watts']:.0f} W drawn, {per:.4g} J/{name.split('/')[0]}")
    return lines
