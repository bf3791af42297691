"""Recorded runs: one JSON file per op, with the machine, versions, date and commit that made it.

BENCH_OUT names the folder; without it nothing is written. A case measured again replaces its
former row, but rows of two commits or machines are never mixed: the file is then begun anew.
"""

import functools
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "apex")


def processor() -> str:
    """The processor's name as its maker spells it, and the numbers that virtual machines keep."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    name = said.get("model name", platform.machine())
    if "cpu family" not in said:
        return name
    return f"{name} (family {said['cpu family']}, model {said.get('model', '?')})"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in found.items() if value}


@functools.cache  # of the whole run, whatever happens to the tree meanwhile
def commit() -> str:
    """The commit of the tree that holds these files, and "+" after changes; "" outside of one."""
    folder = Path(__file__).parent
    try:
        said = [
            subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] + "+" * bool(said[1])


def header(device: str) -> dict[str, Any]:
    made = {
        "format": FORMAT,
        "machine": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": device,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    if device == "cuda":
        made["gpu"] = torch.cuda.get_device_name(0)
    return made


def add(case: Any, result: dict[str, Any], ours: list[str]) -> None:
    """Write the row of a measured case (see `measure.compare`) to its op's file."""
    folder = os.environ.get("BENCH_OUT")
    if not folder:
        return
    path = Path(folder) / f"{case.op}-{case.device}.json"
    begun: dict[str, Any] = header(case.device) | {
        "what": f"benchmarks: {case.op}",
        "rows": [],
    }
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        if all(former.get(key) == begun[key] for key in ("format", "machine", "threads", "commit")):
            begun["rows"] = [
                row
                for row in former["rows"]
                if (row["direction"], row["size"]) != (case.direction, case.size)
            ]
    begun["rows"].append(
        {
            "direction": case.direction,
            "size": case.size,
            "x": case.x,
            "axis": case.axis,
            "on_curve": case.on_curve,
            "unit": case.unit,
            "ceiling": case.ceiling,
            "ours": ours,
            **result,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(begun, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
