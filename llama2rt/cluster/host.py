"""What a record says about the machines: enough to repeat the measurement, and nothing private.

Versions, GPUs, network adapters and host names, as far as this process may read them; no paths,
user names or addresses.
"""

import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import llama2rt
from llama2rt.cluster import presets

_NET = Path("/sys/class/net")


def facts(device: torch.device) -> dict[str, Any]:
    """Of this process: host, its device, and the adapters of its host."""
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "adapters": adapters(),
    }


def footer(of_ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of all ranks together, with the versions of this process."""
    devices = Counter(fact["device"] for fact in of_ranks)
    hosts = list(dict.fromkeys(fact["host"] for fact in of_ranks))
    by_host = {fact["host"]: fact["adapters"] for fact in of_ranks}
    return {
        "hosts": hosts,
        "devices": [f"{count} x {name}" for name, count in devices.items()],
        "adapters": by_host,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Everything between Python and the network, CUDA and NCCL where torch has them."""
    found = {
        "llama2rt": llama2rt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def adapters(infiniband: Path = presets.INFINIBAND, net: Path = _NET) -> list[str]:
    """Active RDMA ports and the network interfaces that are up and have a device behind them."""
    rdma = [
        f"{port.name} {port.link_layer} {port.rate}"
        for port in presets.rdma_ports(infiniband)
        if port.active
    ]
    for folder in sorted(net.glob("*")):
        if not (folder / "device").exists() or _read(folder / "operstate") != "up":
            continue
        speed = _read(folder / "speed")  # Mb/s; virtual adapters say -1 or nothing
        known = speed.isdigit() and int(speed) > 0
        rdma.append(f"{folder.name} {int(speed) / 1000:g} Gb/s" if known else folder.name)
    return rdma


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        name = models[0] if models else name
    except OSError:
        pass
    return f"CPU {name} ({os.cpu_count()} cores)"


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
