"""Energy of a block of work in joules, from the counters of GPUs and CPUs.

    with energy.of_device(device) as meter:
        work()
    print(meter.energy.describe())      # 41.2 J (GPU 0: NVML energy counter)

GPUs: NVML's energy counter, through nvidia-ml-py where it is installed; power sampled ten times a
second where a GPU has no such counter, and named as such. CPUs and DRAM: RAPL, from Linux's
powercap tree, which most systems let only root read. For a device that could not be measured the
reason is given, never 0. The rest of the machine (fans, NICs, power supplies) has no such counter.
This module imports no other of ours, so that training, benchmarks and cluster tools share it.
"""

import importlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

POWERCAP = Path("/sys/class/powercap")

# A counter that is updated every p seconds misses up to p of the work at each end, so a window
# must be ten periods long for an error of a tenth. RAPL: about 1 ms (Intel SDM, volume 3, "RAPL
# Interfaces"). NVML's counter: 20 to 100 ms (PETSc manual, PetscLogGpuEnergyMeter), so 100.
_RAPL_SHORTEST_SECONDS = 0.01
_NVML_SHORTEST_SECONDS = 1.0
_SAMPLE_SECONDS = 0.1
# Often enough to see every wrap: 262 kJ, the range of a common package counter, at 1 kW.
_POLL_SECONDS = 30.0


@dataclass(frozen=True)
class Energy:
    """The energy that devices drew in a stretch of time."""

    seconds: float
    joules: Mapping[str, float] = field(default_factory=dict)
    """by device"""
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """device -> why it has no joules"""
    seconds_needed: float = 0.0
    """the shortest stretch that every counter resolves; 0 where there is no counter"""
    mirrored: Mapping[str, str] = field(default_factory=dict)
    """domains that show again what another counted, and which: no joules of their own"""

    @property
    def total_joules(self) -> float | None:
        """The sum over the devices that were measured; None where none was."""
        return sum(self.joules.values()) if self.joules else None

    def joules_per(self, count: float) -> float | None:
        """Joules a token, a step, a call; None where nothing was measured or `count` is 0."""
        total = self.total_joules
        return None if total is None or not count else total / count

    def describe(self) -> str:
        """One line: the total, of which devices, and what is missing from it."""
        missing = "; ".join(f"{name}: {why}" for name, why in self.not_measured.items())
        total = self.total_joules
        if total is None:
            return f"energy not measured ({missing or 'no device was asked for'})"
        text = f"{total:.4g} J ({', '.join(self.joules)})"
        for name, other in self.mirrored.items():
            text += f", {name} shows the counter of {other} again"
        return f"{text}, not measured: {missing}" if missing else text

    def record(self) -> dict[str, Any]:
        """For JSON: seconds, joules (by device) and not_measured; joules is null without any."""
        return {
            "seconds": self.seconds,
            "joules": dict(self.joules) or None,
            "not_measured": dict(self.not_measured),
            "mirrored": dict(self.mirrored),
        }


class Counter(Protocol):
    """Joules since an arbitrary start, never falling."""

    name: str
    shortest_seconds: float
    poll_seconds: float

    @property
    def mirrors(self) -> str | None:
        """The counter whose values this one repeats, and which is counted instead."""

    def read(self) -> float: ...


class RaplCounter:
    """One domain of the powercap tree (a folder with energy_uj); its wrap-around is undone.

    siblings: counters of other dies of the same package. Linux makes a domain for every die. On
    Intel's multi-die packages (Cascade Lake-AP) each has a counter of its own, on AMD's (Zen 1 and
    2) all show the one of the package, and no file says which it is. Two names of one counter agree
    at every reading; two counters agree at one by chance only, a step of some microjoules in a
    range of 262 kJ. So a domain mirrors a sibling as long as no reading has told them apart.

    OSError where the kernel does not let it be read.
    """

    shortest_seconds, poll_seconds = _RAPL_SHORTEST_SECONDS, _POLL_SECONDS

    def __init__(self, folder: Path, siblings: Sequence["RaplCounter"] = ()) -> None:
        self.name = f"CPU {_domain_name(folder)}"
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._sum = self._raw(), 0
        self._siblings = [other for other in siblings if other._range == self._range]

    @property
    def mirrors(self) -> str | None:
        return self._siblings[0].name if self._siblings else None

    def read(self) -> float:
        self._siblings = [other for other in self._siblings if self._agrees_with(other)]
        now = self._raw()
        # After its largest value the counter goes on at 0.
        self._sum += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return self._sum / 1e6

    def _agrees_with(self, other: "RaplCounter") -> bool:
        """Whether a reading here lies between one there before it and one after it."""
        before, here, after = other._raw(), self._raw(), other._raw()
        return (here - before) % self._range <= (after - before) % self._range

    def _raw(self) -> int:
        return int(self._file.read_text())


def _domain_name(folder: Path) -> str:
    """The kernel's name of a domain; for a subdomain such as intel-rapl:0:1 also its parent's."""
    name = (folder / "name").read_text().strip()
    parent = folder.name.rpartition(":")[0]
    return f"{name} of {_domain_name(folder.parent / parent)}" if ":" in parent else name


class NvmlCounter:
    """NVML's energy counter of one GPU (mJ since the driver was loaded)."""

    shortest_seconds, poll_seconds = _NVML_SHORTEST_SECONDS, float("inf")
    mirrors = None

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self.name = f"{name}: NVML energy counter"
        self._nvml, self._handle = nvml, handle
        self.read()

    def read(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


class SampledPower:
    """Power of one GPU, read every 0.1 s and integrated: misses what happens in between."""

    shortest_seconds, poll_seconds = _NVML_SHORTEST_SECONDS, _SAMPLE_SECONDS
    mirrors = None

    def __init__(
        self, nvml: Any, handle: Any, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = f"{name}: power sampled every {_SAMPLE_SECONDS} s"
        self._nvml, self._handle, self._clock = nvml, handle, clock
        self._time, self._watts, self._joules = clock(), self._power(), 0.0

    def read(self) -> float:
        now, watts = self._clock(), self._power()
        self._joules += (now - self._time) * (watts + self._watts) / 2
        self._time, self._watts = now, watts
        return self._joules

    def _power(self) -> float:
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3


class EnergyMeter:
    """Counts joules from `with` to its end, or from one `lap` to the next.

    gpus: their UUIDs ("GPU-..."), as `gpu_uuid` gives them. host: also CPUs and DRAM. After the
    block, `energy` is that of the whole block. A lap costs a few file reads or driver calls (not
    timed: well under a millisecond each). An error never stops the work: it becomes a reason.
    """

    def __init__(
        self,
        gpus: Sequence[str] = (),
        *,
        host: bool = True,
        powercap: Path = POWERCAP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpus, self._host, self._powercap, self._clock = tuple(gpus), host, powercap, clock
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._poller: threading.Thread | None = None
        self._failed: dict[str, str] = {}
        self.energy = Energy(0.0)

    def __enter__(self) -> Self:
        counters: list[Counter] = []
        self._absent: dict[str, str] = {}
        if self._gpus:
            found, reasons = nvml_counters(self._gpus, self._clock)
            counters += found
            self._absent |= reasons
        if self._host:
            domains, why = rapl_counters(self._powercap)
            counters += domains
            self._absent |= why
        self._counters = counters
        self._start = self._lap_start = self._read()
        interval = min((counter.poll_seconds for counter in counters), default=float("inf"))
        if interval < float("inf"):
            self._poller = threading.Thread(target=self._poll, args=(interval,), daemon=True)
            self._poller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._poller is not None:
            self._poller.join()
        self.energy = self._between(self._start, self._read())

    def lap(self) -> Energy:
        """Energy since the start or the lap before."""
        now = self._read()
        energy, self._lap_start = self._between(self._lap_start, now), now
        return energy

    def peek(self) -> Energy:
        """Energy since the lap before, without beginning a new one."""
        return self._between(self._lap_start, self._read())

    def _read(self) -> tuple[float, dict[str, float]]:
        with self._lock:
            values = {}
            for counter in self._counters:
                try:
                    values[counter.name] = counter.read()
                except Exception as error:
                    self._failed[counter.name] = f"its counter stopped answering ({error})"
            return self._clock(), values

    def _between(
        self, start: tuple[float, dict[str, float]], end: tuple[float, dict[str, float]]
    ) -> Energy:
        seconds = end[0] - start[0]
        joules, reasons, mirrored = {}, {**self._absent}, {}
        for counter in self._counters:
            name = counter.name
            if name in self._failed:
                reasons[name] = self._failed[name]
            elif counter.mirrors is not None:
                mirrored[name] = counter.mirrors
            elif seconds < counter.shortest_seconds:
                reasons[name] = (
                    f"{seconds:.2g} s are too short for a counter that needs "
                    f"{counter.shortest_seconds:g} s"
                )
            elif end[1][name] <= start[1][name]:
                reasons[name] = f"its counter did not advance in {seconds:.2g} s"
            else:
                joules[name] = end[1][name] - start[1][name]
        needed = max((counter.shortest_seconds for counter in self._counters), default=0.0)
        return Energy(seconds, joules, reasons, needed, mirrored)

    def _poll(self, interval: float) -> None:
        while not self._done.wait(interval):
            self._read()


def of_device(device: Any, *, host: bool = True) -> EnergyMeter:
    """A meter of the GPU behind a torch `device` (none for a CPU) and of the host."""
    return EnergyMeter([gpu_uuid(device)] if device.type == "cuda" else [], host=host)


def gpu_uuid(device: Any) -> str:
    """NVML's name of a torch CUDA device; its index would be another with CUDA_VISIBLE_DEVICES."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def nvml_counters(
    gpus: Iterable[str], clock: Callable[[], float] = time.monotonic
) -> tuple[list[Counter], dict[str, str]]:
    """Counters of `gpus` (UUIDs), and for each GPU without one the reason."""
    try:
        nvml = nvml_module()
    except OSError as error:
        return [], {gpu: str(error) for gpu in gpus}
    counters: list[Counter] = []
    reasons = {}
    for gpu in gpus:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(gpu)
            try:
                counters.append(NvmlCounter(nvml, handle, gpu))
            except nvml.NVMLError:
                counters.append(SampledPower(nvml, handle, gpu, clock))
        except nvml.NVMLError as error:
            reasons[gpu] = f"NVML gives neither its energy nor its power ({error})"
    return counters, reasons


def nvml_module() -> Any:
    """nvidia-ml-py's module, initialised; OSError with the reason where that is impossible."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise OSError("nvidia-ml-py is not installed (pip install nvidia-ml-py)") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from None
    return nvml


def rapl_counters(powercap: Path = POWERCAP) -> tuple[list[Counter], dict[str, str]]:
    """RAPL domains that do not overlap (packages and DRAM), and why there are none.

    A package holds its cores and its graphics ("uncore"), and "psys" holds the packages: these are
    left out. intel-rapl-mmio shows the packages of intel-rapl a second time and is read where those
    are missing. AMD's counters are in the tree intel-rapl too.
    """
    for tree in ("intel-rapl", "intel-rapl-mmio"):
        counters, reasons = _rapl_tree(sorted(powercap.glob(f"{tree}:*")))
        if counters or reasons:
            return counters, reasons
    return [], {"CPU": f"no RAPL domain below {powercap} (virtual machines have none)"}


def _rapl_tree(folders: Sequence[Path]) -> tuple[list[Counter], dict[str, str]]:
    counters: list[Counter] = []
    reasons = {}
    dies: dict[str, list[RaplCounter]] = {}  # those of one package, by its domain without the die
    for folder in folders:
        try:
            name = _domain_name(folder)
            if not name.startswith(("package", "dram")):
                continue
            package = re.sub(r"-die-\d+$", "", name)
            siblings = dies.setdefault(package, []) if package != name else []
            counter = RaplCounter(folder, siblings)
            siblings.append(counter)
            if any(counter.name == other.name for other in counters):
                counter.name += f" ({folder.name})"  # joules are kept by name
            counters.append(counter)
        except PermissionError:
            reasons[folder.name] = f"{folder / 'energy_uj'} may be read by root only"
        except (OSError, ValueError) as error:
            reasons[folder.name] = f"{folder}: {error}"
    return counters, reasons


def in_turn(parts: Sequence[Energy]) -> Energy:
    """The sum of laps; a device that one of them could not measure is not measured."""
    reasons = {name: why for part in parts for name, why in part.not_measured.items()}
    # A domain that mirrored another in one lap and not in a later one has nothing in the first.
    names = {name: None for part in parts for name in part.joules if name not in reasons}
    joules = {name: sum(part.joules.get(name, 0.0) for part in parts) for name in names}
    mirrored = {name: other for part in parts for name, other in part.mirrored.items()}
    still = {name: other for name, other in mirrored.items() if name not in joules}
    return Energy(sum(part.seconds for part in parts), joules, reasons, mirrored=still)


def together(parts: Sequence[Energy]) -> dict[str, Any]:
    """For JSON: the sum over the processes of a job, each of which measured other devices.

    joules is null where nothing was measured; not_measured lists each reason once.
    """
    measured = [part.total_joules for part in parts if part.total_joules is not None]
    reasons = {f"{name}: {why}" for part in parts for name, why in part.not_measured.items()}
    return {
        "joules": sum(measured) if measured else None,
        "devices": sum(len(part.joules) for part in parts),
        "not_measured": sorted(reasons),
    }
