"""The meter against counters whose values the test sets: wrap-around, several devices, none."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama2rt import energy
from llama2rt.energy import Energy, EnergyMeter

NO_COUNTERS = Path("/nonexistent")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def domain(root: Path, name: str, label: str, microjoules: int, largest: int = 10_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    return folder / "energy_uj"


class FakeNvml:
    """GPU-a has an energy counter, GPU-b only a power reading, GPU-c neither."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules, self.milliwatts = 5_000_000, 100_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in ("GPU-a", "GPU-b", "GPU-c"):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle != "GPU-a":
            raise self.NVMLError("Not Supported")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle == "GPU-c":
            raise self.NVMLError("Not Supported")
        return self.milliwatts


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    # The test drives the samples itself.
    monkeypatch.setattr(energy.SampledPower, "poll_seconds", float("inf"))
    return fake


def test_packages_and_dram_are_summed_and_cores_are_not_counted_twice(tmp_path):
    files = [
        domain(tmp_path, name, label, 100)
        for name, label in [
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        ]
    ]
    clock = Clock()
    with EnergyMeter(powercap=tmp_path, clock=clock) as meter:
        clock.now = 2.0
        for file in files:
            file.write_text("3000100")
    assert meter.energy.joules == {
        "CPU package-0": 3.0,
        "CPU dram of package-0": 3.0,
        "CPU package-1": 3.0,
    }
    assert meter.energy.total_joules == 9.0
    assert meter.energy.seconds == 2.0 and not meter.energy.not_measured


def of_two_dies(root: Path, *readings: tuple[int, int], subdomain: str | None = None):
    """Energy of a second a reading from a package whose two dies show these microjoules."""
    files = [domain(root, f"intel-rapl:{i}", f"package-0-die-{i}", readings[0][i]) for i in (0, 1)]
    if subdomain:
        below = (f"intel-rapl:{i}:0" for i in (0, 1))
        files += [domain(root, name, subdomain, readings[0][i]) for i, name in enumerate(below)]
    clock = Clock()
    with EnergyMeter(powercap=root, clock=clock) as meter:
        for reading in readings[1:]:
            clock.now += 1.0
            for file, microjoules in zip(files, reading * 2, strict=False):
                file.write_text(str(microjoules))
            meter.peek()
    return meter.energy


@pytest.mark.parametrize(
    "readings",
    [
        [(1_000_000, 1_000_000), (4_000_000, 4_000_000)],
        [(0, 0), (3_000_000, 3_000_000)],
        [(9_000_000, 9_000_000), (2_000_000, 2_000_000)],  # over the top
    ],
)
def test_dies_that_show_one_counter_are_counted_once(tmp_path, readings):
    used = of_two_dies(tmp_path, *readings)
    assert used.joules == {"CPU package-0-die-0": 3.0}
    assert used.mirrored == {"CPU package-0-die-1": "CPU package-0-die-0"}
    assert "package-0-die-1 shows the counter of CPU package-0-die-0 again" in used.describe()
    assert not used.not_measured and used.record()["mirrored"]


def test_dram_of_dies_that_show_one_counter_is_counted_once(tmp_path):
    used = of_two_dies(tmp_path, (100, 100), (2_000_100, 2_000_100), subdomain="dram")
    assert used.joules == {"CPU package-0-die-0": 2.0, "CPU dram of package-0-die-0": 2.0}


def test_cores_of_a_die_are_not_counted(tmp_path):
    used = of_two_dies(tmp_path, (100, 200), (2_000_100, 1_000_200), subdomain="core")
    assert used.joules == {"CPU package-0-die-0": 2.0, "CPU package-0-die-1": 1.0}


@pytest.mark.parametrize(
    "readings",
    [
        [(1_000_000, 5_000_000), (4_000_000, 6_000_000)],
        [(100, 101), (3_000_100, 1_000_101)],
        [(100, 100), (3_000_100, 1_000_100)],  # equal at the start, by chance
        [(100, 100), (2_000_100, 500_100), (3_000_100, 1_000_100)],
        [(100, 100), (4_000_000, 300), (3_000_100, 1_000_100)],  # 3 J: once round and 6 J on
    ],
)
def test_dies_with_counters_of_their_own_are_added(tmp_path, readings):
    used = of_two_dies(tmp_path, *readings)
    round_ = 10.0 if readings[-2][0] > readings[-1][0] else 0.0
    assert used.joules == {"CPU package-0-die-0": 3.0 + round_, "CPU package-0-die-1": 1.0}
    assert not used.mirrored


def test_a_counter_that_moves_while_its_mirror_is_read_is_still_one(tmp_path, monkeypatch):
    files = [domain(tmp_path, f"intel-rapl:{i}", f"package-0-die-{i}", 0) for i in (0, 1)]
    moving, read_text = [9_999_000], Path.read_text

    def read(path: Path, *args, **kwargs) -> str:
        if path not in files:
            return read_text(path, *args, **kwargs)
        moving[0] = (moving[0] + 700) % 10_000_000
        return str(moving[0])

    monkeypatch.setattr(Path, "read_text", read)
    clock = Clock()
    with EnergyMeter(powercap=tmp_path, clock=clock) as meter:
        clock.now, moving[0] = 1.0, 5_000_000
    assert meter.energy.mirrored == {"CPU package-0-die-1": "CPU package-0-die-0"}
    assert meter.energy.total_joules == pytest.approx(5.0, abs=0.01)


def test_two_packages_are_two_even_where_they_read_the_same(tmp_path):
    labels = [f"package-{i}-die-{j}" for i in (0, 1) for j in (0, 1)]
    files = [domain(tmp_path, f"intel-rapl:{n}", name, 100) for n, name in enumerate(labels)]
    clock = Clock()
    with EnergyMeter(powercap=tmp_path, clock=clock) as meter:
        clock.now = 1.0
        for file in files:
            file.write_text("1000100")
    assert meter.energy.joules == {"CPU package-0-die-0": 1.0, "CPU package-1-die-0": 1.0}


def test_domains_of_one_name_are_both_counted(tmp_path):
    files = [domain(tmp_path, f"intel-rapl:{i}", "package-0", 100) for i in (0, 1)]
    clock = Clock()
    with EnergyMeter(powercap=tmp_path, clock=clock) as meter:
        clock.now = 1.0
        for file, microjoules in zip(files, (2_000_100, 5_000_100), strict=True):
            file.write_text(str(microjoules))
    assert meter.energy.joules == {"CPU package-0": 2.0, "CPU package-0 (intel-rapl:1)": 5.0}


def test_packages_of_the_mmio_tree_are_read_where_the_other_is_missing(tmp_path):
    file = domain(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    clock = Clock()
    with EnergyMeter(powercap=tmp_path, clock=clock) as meter:
        clock.now = 1.0
        file.write_text("2000100")
    assert meter.energy.joules == {"CPU package-0": 2.0}


def test_a_counter_that_wraps_twice_loses_nothing_that_a_reading_saw(tmp_path):
    file = domain(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    clock = Clock()
    with EnergyMeter(powercap=tmp_path, clock=clock) as meter:
        file.write_text("500000")  # 1.5 J on, over the top
        clock.now = 1.0
        assert meter.peek().total_joules == 1.5
        file.write_text("9500000")
        meter.peek()
        file.write_text("250000")  # 0.75 J on, over the top again
        clock.now = 2.0
        assert meter.lap().total_joules == pytest.approx(11.25)
        clock.now = 3.0
        file.write_text("350000")
        assert meter.lap().total_joules == pytest.approx(0.1)
    assert meter.energy.total_joules == pytest.approx(11.35)


def test_gpus_by_counter_by_sampled_power_and_without_either(nvml):
    clock = Clock()
    gpus = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
    with EnergyMeter(gpus, host=False, clock=clock) as meter:
        clock.now, nvml.milliwatts = 2.0, 300_000
        meter.peek()  # a sample half way: 2 s at (100 + 300) / 2 W
        clock.now, nvml.millijoules = 4.0, 5_700_000
    assert meter.energy.joules == {
        "GPU-a: NVML energy counter": 700.0,
        "GPU-b: power sampled every 0.1 s": 400.0 + 600.0,
    }
    assert "Not Supported" in meter.energy.not_measured["GPU-c"]
    assert "Not Found" in meter.energy.not_measured["GPU-d"]
    assert "sampled" in meter.energy.describe() and "not measured: GPU-c" in meter.energy.describe()


def test_power_is_sampled_while_the_work_runs(nvml, monkeypatch):
    monkeypatch.setattr(energy.SampledPower, "poll_seconds", 0.001)
    samples = []
    power = FakeNvml.nvmlDeviceGetPowerUsage
    monkeypatch.setattr(
        FakeNvml, "nvmlDeviceGetPowerUsage", lambda *a: samples.append(1) or power(*a)
    )
    with EnergyMeter(["GPU-b"], host=False):
        deadline = 200
        while len(samples) < 5 and deadline:
            deadline -= 1
            torch.zeros(1).sum()
            energy.time.sleep(0.01)
    assert len(samples) >= 5
    seen = len(samples)
    energy.time.sleep(0.05)
    assert len(samples) == seen  # and no longer


def test_a_short_window_is_not_measured_rather_than_wrong(nvml):
    clock = Clock()
    with EnergyMeter(["GPU-a"], host=False, clock=clock) as meter:
        clock.now, nvml.millijoules = 0.3, 5_000_001
    assert meter.energy.total_joules is None
    assert "too short" in meter.energy.describe()


def test_a_counter_that_stands_still_or_falls_is_not_measured(nvml):
    for millijoules in (5_000_000, 100):
        clock = Clock()
        nvml.millijoules = 5_000_000
        with EnergyMeter(["GPU-a"], host=False, clock=clock) as meter:
            clock.now, nvml.millijoules = 5.0, millijoules
        assert meter.energy.total_joules is None
        assert "did not advance" in meter.energy.describe()


def test_a_counter_that_dies_is_a_reason_and_not_an_error(nvml, monkeypatch):
    clock = Clock()
    with EnergyMeter(["GPU-a"], host=False, clock=clock) as meter:
        clock.now = 5.0
        monkeypatch.setattr(
            FakeNvml,
            "nvmlDeviceGetTotalEnergyConsumption",
            lambda *_: (_ for _ in ()).throw(FakeNvml.NVMLError("GPU is lost")),
        )
    assert "GPU is lost" in meter.energy.describe()
    assert meter.energy.total_joules is None


def test_without_any_counter_the_reason_is_said_and_nothing_is_zero(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import pynvml fails
    with EnergyMeter(["GPU-a"], powercap=NO_COUNTERS) as meter:
        pass
    assert meter.energy.total_joules is None
    assert meter.energy.joules_per(100) is None
    assert meter.energy.record()["joules"] is None
    assert "pip install nvidia-ml-py" in meter.energy.not_measured["GPU-a"]
    assert "no RAPL domain" in meter.energy.not_measured["CPU"]


def test_a_driver_that_is_not_loaded_is_named(nvml, monkeypatch):
    def fail(self: FakeNvml) -> None:
        raise self.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(FakeNvml, "nvmlInit", fail)
    counters, reasons = energy.nvml_counters(["GPU-a"])
    assert not counters and reasons == {"GPU-a": "NVML: Driver Not Loaded"}


def test_a_counter_only_root_may_read_is_named(tmp_path, monkeypatch):
    file = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refuse(path: Path, *args, **kwargs) -> str:
        if path == file:
            raise PermissionError
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    counters, reasons = energy.rapl_counters(tmp_path)
    assert not counters and "root only" in reasons["intel-rapl:0"]


def test_joules_per_token_and_of_several_processes():
    a = Energy(2.0, {"GPU-a": 30.0}, {"CPU": "none"})
    b = Energy(2.0, {"GPU-b": 10.0}, {"CPU": "none"})
    assert a.joules_per(60) == 0.5
    assert energy.together([a, b]) == {
        "joules": 40.0,
        "devices": 2,
        "not_measured": ["CPU: none"],
    }
    nothing = energy.together([Energy(1.0, {}, {"CPU": "none"})])
    assert nothing["joules"] is None
    json.dumps([a.record(), nothing])


def test_laps_add_up_to_what_all_of_them_measured():
    laps = [
        Energy(1.0, {"a": 3.0, "b": 5.0}),
        Energy(2.0, {"a": 4.0}, {"b": "2 s are too short"}),
    ]
    total = energy.in_turn(laps)
    assert total.joules == {"a": 7.0} and total.seconds == 3.0
    assert total.not_measured == {"b": "2 s are too short"}
    assert energy.in_turn([laps[1], laps[0]]).joules == {"a": 7.0}
    assert energy.in_turn([]).total_joules is None


def test_laps_with_a_domain_that_mirrored_another_at_first():
    once = Energy(1.0, {"a": 3.0}, mirrored={"b": "a"})
    assert energy.in_turn([once, once]).mirrored == {"b": "a"}
    total = energy.in_turn([once, Energy(1.0, {"a": 3.0, "b": 2.0})])
    assert total.joules == {"a": 6.0, "b": 2.0} and not total.mirrored


def test_a_cpu_run_does_not_count_gpus():
    assert energy.of_device(torch.device("cpu"))._gpus == ()


def test_the_uuid_is_that_of_the_torch_device(monkeypatch):
    properties = SimpleNamespace(uuid="1234-5678")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert energy.gpu_uuid(torch.device("cuda", 0)) == "GPU-1234-5678"
