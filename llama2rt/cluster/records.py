"""The record of a measured run: its rows, its file, and two of them compared.

A row keeps every timed call, so that a comparison can say how sure it is: the ratio of medians at
each size with a bootstrap interval over the recorded calls (Efron and Tibshirani, chapter 16).
Calls of one run share its day and its placement on the cluster, so the interval is about these two
runs, not about all runs on these fabrics: repeat runs for that.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2rt import atomic, energy
from llama2rt.cluster.operations import bandwidths_bytes_per_s
from llama2rt.cluster.timing import Clocks, Overlap, stragglers
from llama2rt.errors import InputError

_KIND = "llama2rt cluster bench"


def new(
    warmup: int, iterations: int, backend: str, ranks: int, footer: Mapping[str, Any]
) -> dict[str, Any]:
    """A record without rows, of a run that has begun."""
    return {
        "what": _KIND,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": backend,
        "ranks": ranks,
        "dtype": "fp32",
        "warmup": warmup,
        "iterations": iterations,
        "footer": dict(footer),
        "complete": False,
        "stopped": None,
        "rows": [],
        "skipped": [],
    }


def row(
    operation: str,
    total_bytes: int,
    stamps: NDArray[np.float64],
    clocks: Clocks,
    used: Sequence[energy.Energy],
    overlaps: Sequence[Overlap] = (),
) -> dict[str, Any]:
    """One size of one operation from the `stamps` [ranks, calls, 2] of all ranks.

    A call lasts as long as on its slowest rank. Energies are those of the timed calls together.
    """
    ranks, calls, _ = stamps.shape
    seconds = (stamps[..., 1] - stamps[..., 0]).max(axis=0)
    median = float(np.median(seconds))
    algorithm, bus = bandwidths_bytes_per_s(operation, total_bytes, ranks, median)
    by_rank, slowest = stragglers(stamps, clocks)
    total = energy.together(used)
    joules = total["joules"]
    return {
        "op": operation,
        "bytes": total_bytes,
        "median_seconds": median,
        "p99_seconds": float(np.quantile(seconds, 0.99)),
        "algorithm_bandwidth_bytes_per_s": algorithm,
        "bus_bandwidth_bytes_per_s": bus,
        "seconds": seconds.tolist(),
        "slowest_rank": slowest,
        "stragglers": [asdict(rank) for rank in by_rank],
        "clock_uncertainty_seconds": float(clocks.uncertainty_seconds.max()),
        "joules_per_call": None if joules is None else joules / calls,
        "energy": total,
        "overlap": _worst(overlaps) if overlaps else None,
    }


def _worst(overlaps: Sequence[Overlap]) -> dict[str, Any]:
    """The rank whose collective suffers most, and the slow-downs of all of them."""
    worst = max(overlaps, key=lambda overlap: overlap.collective_slowdown)
    return {
        **asdict(worst),
        "collective_slowdown": [overlap.collective_slowdown for overlap in overlaps],
        "gemm_slowdown": [overlap.gemm_slowdown for overlap in overlaps],
    }


def write(record: Mapping[str, Any], path: Path) -> None:
    """Replace the file `path` by the record."""
    atomic.write(path, json.dumps(record, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A record written by `write`; InputError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(record, dict) or record.get("what") != _KIND:
        raise InputError(f"{path}: not a record of {_KIND}")
    return record


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Bus bandwidth of `a` over that of `b` at each operation and size that both hold.

    rows[].{op, bytes, ratio, low, high}: above 1, `a` is faster. InputError where nothing is
    common, or the number of ranks differs, which makes another experiment.
    """
    if a["ranks"] != b["ranks"]:
        raise InputError(f"the runs have {a['ranks']} and {b['ranks']} ranks: nothing to compare")
    others = {(row["op"], row["bytes"]): row for row in b["rows"]}
    both = [row for row in a["rows"] if (row["op"], row["bytes"]) in others]
    if not both:
        raise InputError("the runs have no operation and size in common")
    generator = np.random.default_rng(seed)

    def medians(seconds: Sequence[float]) -> NDArray[np.float64]:
        values = np.asarray(seconds)
        drawn = generator.integers(0, len(values), (resamples, len(values)))
        return np.median(values[drawn], axis=1)

    rows = []
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    for mine in both:
        other = others[mine["op"], mine["bytes"]]
        low, high = np.quantile(medians(other["seconds"]) / medians(mine["seconds"]), tails)
        ratio = other["median_seconds"] / mine["median_seconds"]
        rows.append(
            {
                "op": mine["op"],
                "bytes": mine["bytes"],
                "ratio": ratio,
                "low": float(low),
                "high": float(high),
            }
        )
    return {"what": "bus bandwidth of A over B", "confidence": confidence, "rows": rows}


def nccl_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer NCCL and gloo, as this process has them."""
    prefixes = ("NCCL_", "GLOO_", "TORCH_NCCL_")
    return {name: environment[name] for name in sorted(environment) if name.startswith(prefixes)}
