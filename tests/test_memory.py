"""Free memory as the machine and its cgroups tell it, on made trees of /proc and /sys."""

import os
from pathlib import Path

import pytest
import torch

from llama2rt import memory

GIB = 2**30


def tree(root: Path, files: dict[str, object]) -> Path:
    meminfo = f"MemTotal: {32 << 20} kB\nMemAvailable: {16 << 20} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def version_2(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    at = f"sys/fs/cgroup{folder}"
    return {
        f"{at}/memory.max": limit,
        f"{at}/memory.current": used,
        f"{at}/memory.stat": f"anon 5\nactive_file 7\ninactive_file {cache}",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16 * GIB),
        ({"proc/self/cgroup": "0::/", **version_2("", "max", GIB)}, 16 * GIB),
        # What the page cache holds is given back when it is needed.
        ({"proc/self/cgroup": "0::/", **version_2("", 4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
        ({"proc/self/cgroup": "0::/", **version_2("", GIB, 2 * GIB)}, 0),
        ({"proc/self/cgroup": "0::/", **version_2("", 64 * GIB, GIB)}, 16 * GIB),
        # The tightest of a cgroup and those it lies in.
        (
            {
                "proc/self/cgroup": "0::/jobs/7",
                **version_2("/jobs/7", 8 * GIB, GIB),
                **version_2("/jobs", 6 * GIB, 3 * GIB),
            },
            3 * GIB,
        ),
        # A container that sees its own as the topmost, under the path that the host knows.
        ({"proc/self/cgroup": "0::/docker/abc", **version_2("", 2 * GIB, GIB)}, GIB),
        # Version 1, among controllers that are not memory's.
        (
            {
                "proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/x\n1:name=systemd:/x",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": 5 * GIB,
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": 3 * GIB,
                "sys/fs/cgroup/memory/x/memory.stat": f"cache 9\ntotal_inactive_file {GIB}",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": 9 * GIB,
            },
            3 * GIB,
        ),
    ],
)
def test_the_least_of_machine_and_cgroups(tmp_path, files, expected):
    assert memory.host_bytes(tree(tmp_path, files)) == expected


def test_without_proc_the_whole_machine(tmp_path):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.host_bytes(tmp_path) == whole


def test_this_machine():
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_bytes(torch.device("cpu")) <= whole
