"""How much memory a process may still take, read where its limit is set.

A container's limit is its cgroup's, which /proc/meminfo does not know: a process that relies on the
host's free memory is killed without a message. Limits that are no cgroup's (ulimit -v) are not
read.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_bytes(device: "torch.device") -> int:
    """Bytes that this process may still allocate on `device`.

    CUDA: what the driver has free and what torch's allocator holds unused. Otherwise the host's
    available memory, or what its cgroup leaves if that is less, shared evenly by the processes of
    torchrun on this host; where the system does not tell (no /proc), all of its memory.
    """
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_bytes(root: Path = Path("/")) -> int:
    """Available memory of the machine whose /proc and /sys lie below `root`, as its cgroups let
    this process have it."""
    known = _table(root / "proc/meminfo")
    if "MemAvailable:" not in known:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([known["MemAvailable:"] * 1024, *_cgroup_bytes(root)]))


# (folder of the hierarchy, its limit, its use, the reclaimable part in memory.stat) by version.
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def _cgroup_bytes(root: Path) -> list[int]:
    """What each cgroup with a limit, from this process's up to the topmost, leaves to allocate."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _CGROUPS:
                continue
            folder, limit_file, use_file, reclaimable = _CGROUPS[controller]
            top = root / folder
            # A container may see its own cgroup as the topmost, under a path that is the host's.
            own = Path(path.lstrip("/"))
            for part in (own, *own.parents):
                limit, use = _number(top / part / limit_file), _number(top / part / use_file)
                if limit is not None and use is not None:
                    cache = _table(top / part / "memory.stat").get(reclaimable, 0)
                    found.append(limit - use + cache)
    return found


def _number(path: Path) -> int | None:
    """None where the file is absent or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """First word -> second word of each line, if that is a number; empty without the file."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
