"""Collectives through pytest-benchmark: gloo between two processes, NCCL between all GPUs.

`llama2rt cluster bench` measures; a row here is one operation at one size, its time that of the
slowest rank, its bus bandwidth that of nccl-tests. What is timed by pytest-benchmark is the whole
command, start and checks included; the figures are in extra_info and in the printed line.

    pytest -s benchmarks/collectives
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama2rt.cluster import bench_output
from llama2rt.cluster.operations import OPERATIONS

# On CPUs a size within the caches and one beyond; on GPUs where latency and where bandwidth rules.
SIZES = {"gloo": ("1KiB", "16MiB"), "nccl": ("1KiB", "256MiB")}
KEYS = (
    "median_seconds",
    "p99_seconds",
    "algorithm_bandwidth_bytes_per_s",
    "bus_bandwidth_bytes_per_s",
    "slowest_rank",
    "joules_per_call",
    "energy",
)


def measured(operation: str, size: str, backend: str, ranks: int, out: Path) -> dict:
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--no-python", "--", sys.executable, "-P"]
    command += ["-m", "llama2rt.cli", "cluster", "bench", "--backend", backend]
    command += ["--ops", operation, "--min-bytes", size, "--max-bytes", size, "--out", str(out)]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("backend", SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_collectives(benchmark, capsys, tmp_path, operation, backend):
    ranks = 2 if backend == "gloo" else torch.cuda.device_count()
    if backend == "nccl" and ranks < 2:
        pytest.skip(f"nccl between GPUs needs two, {ranks} found")
    records = []

    def run() -> None:
        for size in SIZES[backend]:
            records.append(measured(operation, size, backend, ranks, tmp_path / f"{size}.json"))

    benchmark.pedantic(run, rounds=1)
    for record in records:
        (row,) = record["rows"]
        figures = {key: row[key] for key in KEYS}
        benchmark.extra_info[f"{row['bytes']} bytes"] = figures
        with capsys.disabled():
            print(f"\n{ranks} ranks, {backend}: {bench_output.line(operation, 0, row)}")
    with capsys.disabled():
        print("\n".join(bench_output.foot(records[0])))
    benchmark.extra_info.update(ranks=ranks, backend=backend, footer=records[0]["footer"])
