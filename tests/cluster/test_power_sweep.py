"""Power caps on a GPU that the test plays: checked before, restored after, whatever happens."""

import os
import signal
import sys

import pytest
import torch

from llama2rt.cluster import power_sweep
from llama2rt.errors import InputError

GPU = "GPU-a"


class FakeGpu:
    """400 W cap, 100 to 400 allowed; draws its cap; energy grows with each unit of work."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.cap, self.history, self.millijoules = 400_000, [], 0
        self.refuse = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        return self.cap

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: str) -> tuple[int, int]:
        return 100_000, 400_000

    def nvmlDeviceSetPowerManagementLimit(self, handle: str, milliwatts: int) -> None:
        if self.refuse:
            raise self.NVMLError("Insufficient Permissions")
        self.cap = milliwatts
        self.history.append(milliwatts)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in the work."""
    now = [0.0]
    monkeypatch.setattr(power_sweep.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(power_sweep.energy.time, "monotonic", lambda: now[0])
    real = power_sweep.energy.EnergyMeter
    monkeypatch.setattr(
        power_sweep.energy,
        "EnergyMeter",
        lambda gpus, host: real(gpus, host=host, clock=lambda: now[0]),
    )
    return now


def work(gpu, clock, seconds_at=lambda watts: 0.25):
    def call() -> None:
        seconds = seconds_at(gpu.cap / 1e3)
        clock[0] += seconds
        gpu.millijoules += round(gpu.cap * seconds)

    return {"matmul": (call, 1e12, "FLOP")}


def test_each_cap_is_measured_and_the_old_one_comes_back(gpu, clock):
    slower = work(gpu, clock, lambda watts: 0.25 if watts > 350 else 0.5)
    rows = power_sweep.sweep(GPU, slower, [300, 400], 2.0)
    assert gpu.history == [400_000, 300_000, 400_000] and gpu.cap == 400_000
    assert [row["cap_watts"] for row in rows] == [400, 300]
    assert [row["units_per_second"] for row in rows] == [4e12, 2e12]
    assert [row["relative_throughput"] for row in rows] == [1.0, 0.5]
    assert [row["watts"] for row in rows] == [400, 300]
    assert [row["joules_per_unit"] for row in rows] == pytest.approx([100e-12, 150e-12])
    lines = power_sweep.describe(rows)
    assert "400 W drawn" in lines[0] and "150 J/TFLOP" in lines[1]


def test_without_caps_nothing_is_set(gpu, clock):
    (row,) = power_sweep.sweep(GPU, work(gpu, clock), [], 2.0)
    assert gpu.history == [] and row["cap_watts"] == 400 and row["relative_throughput"] == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_the_old_cap_comes_back_after_an_error(gpu, clock, error):
    def call() -> None:
        clock[0] += 1.0
        if gpu.cap == 300_000:
            raise error

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        power_sweep.sweep(GPU, {"matmul": (call, 1.0, "FLOP")}, [400, 300, 200], 2.0)
    assert gpu.history == [400_000, 300_000, 400_000]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_old_cap_comes_back_after_a_signal_and_a_second_one(gpu, clock, number, monkeypatch):
    before = signal.getsignal(number)
    set_limit = FakeGpu.nvmlDeviceSetPowerManagementLimit

    def slow_restore(self, handle: str, milliwatts: int) -> None:
        if milliwatts == 400_000:
            os.kill(os.getpid(), number)  # the impatient second Ctrl-C
        set_limit(self, handle, milliwatts)

    monkeypatch.setattr(FakeGpu, "nvmlDeviceSetPowerManagementLimit", slow_restore)

    def call() -> None:
        clock[0] += 1.0
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match="cap is restored"):
        power_sweep.sweep(GPU, {"matmul": (call, 1.0, "FLOP")}, [300], 2.0)
    assert gpu.history == [300_000, 400_000]
    assert signal.getsignal(number) == before


def test_a_cap_out_of_range_is_refused_before_any_is_set(gpu, clock):
    with pytest.raises(InputError, match="100 to 400 W"):
        power_sweep.sweep(GPU, work(gpu, clock), [300, 450], 2.0)
    assert gpu.history == []


def test_without_permission_the_reason_is_said(gpu, clock):
    gpu.refuse = True
    with pytest.raises(OSError, match=r"Insufficient Permissions \(only root may\)"):
        power_sweep.sweep(GPU, work(gpu, clock), [300], 2.0)


def test_a_cap_that_does_not_come_back_is_told_with_the_remedy(gpu, clock):
    def call() -> None:
        clock[0] += 1.0
        gpu.refuse = True

    with pytest.raises(OSError, match="nvidia-smi --power-limit=400"):
        power_sweep.sweep(GPU, {"matmul": (call, 1.0, "FLOP")}, [300], 2.0)


def test_throughput_without_energy_is_still_a_row(gpu, clock, monkeypatch):
    def lost(self, handle: str) -> int:
        raise self.NVMLError("Not Supported")

    monkeypatch.setattr(FakeGpu, "nvmlDeviceGetTotalEnergyConsumption", lost)
    monkeypatch.setattr(FakeGpu, "nvmlDeviceGetPowerUsage", lost, raising=False)
    (row,) = power_sweep.sweep(GPU, work(gpu, clock), [], 2.0)
    assert row["watts"] is None and row["joules_per_unit"] is None
    assert "energy not measured: NVML gives neither" in power_sweep.describe([row])[0]


def test_without_a_gpu_it_is_bad_input():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match="torch finds none here"):
        power_sweep.power_sweep()
