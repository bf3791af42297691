"""Work with its energy: a matrix product and a copy, joules a unit beside the rate.

On a GPU these are the workloads of `llama2rt cluster power-sweep` at the present power cap, which
is not touched; on a CPU smaller ones. Energy that no counter shows is named with the reason.

    pytest -s benchmarks/cluster
"""

import time

import pytest
import torch

from llama2rt import energy
from llama2rt.cluster import power_sweep

SECONDS = {"cpu": 1.0, "cuda": 5.0}  # counters of GPUs need more than one


def cpu_workloads() -> dict[str, power_sweep.Workload]:
    """A fp32 matrix product of 1024 and a copy of 256 MiB, beyond any cache."""
    a, b = torch.randn(2, 1024, 1024)
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    return {
        "matmul": (lambda: torch.mm(a, b), 2 * 1024**3, "FLOP"),
        "copy": (lambda: target.copy_(source), 2 * source.nbytes, "bytes"),
    }


@pytest.mark.parametrize("device", SECONDS)
@pytest.mark.parametrize("workload", ["matmul", "copy"])
def test_energy_of_work(benchmark, capsys, workload, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no usable NVIDIA GPU")
    found = power_sweep.workloads(torch.device("cuda")) if device == "cuda" else cpu_workloads()
    call, units, unit = found[workload]
    call()

    def run() -> None:
        calls, start = 0, time.perf_counter()
        with energy.of_device(torch.device(device)) as meter:
            while time.perf_counter() - start < SECONDS[device]:
                call()
                calls += 1
            elapsed = time.perf_counter() - start
        benchmark.extra_info.update(
            unit=unit,
            units_per_second=calls * units / elapsed,
            joules_per_unit=meter.energy.joules_per(calls * units),
            energy=meter.energy.record(),
            threads=torch.get_num_threads(),
        )
        with capsys.disabled():
            rate = calls * units / elapsed / 1e9
            print(f"\n{workload} on {device}: {rate:.2f} G{unit}/s, {meter.energy.describe()}")

    benchmark.pedantic(run, rounds=1)
