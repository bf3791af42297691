"""The bytes that FSDP moves are those of the theory, and the benchmark of its cost runs."""

import json
import os
from pathlib import Path

import pytest
from processes import run_python

SCRIPT = Path(__file__).parents[2] / "benchmarks/training/parallel_cost.py"


def test_sharding_moves_what_it_should():
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    settings = {"BENCH_SMOKE": "1", "PYTHONPATH": path}
    done = run_python(SCRIPT, "--rounds", 1, env=settings, timeout_seconds=300)
    record = json.loads(done.stdout)
    for rank in record["bytes"]:
        assert rank["handed"] == rank["expected"] and min(rank["expected"].values()) > 0
    losses = record["first_loss"]
    # bf16 products of other numbers of rows may round otherwise.
    assert losses["fsdp"] == pytest.approx(losses["one"], rel=1e-4)
    assert record["ratio"] > 0 and len(record["seconds"]["fsdp"]) == 1
