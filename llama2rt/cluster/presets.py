"""NCCL's environment for the three fabrics that are compared: InfiniBand, RoCE and plain TCP.

A preset is what one would export by hand before a run; it is set before the process group is made
and printed with where each value comes from. What the user has exported stays, unless it would
choose another transport than the preset's name says. Meanings are those of NCCL's user guide
(Environment Variables). Nothing is set that tunes algorithms: NCCL chooses them itself.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama2rt.errors import InputError

Fabric = Literal["ib", "roce", "tcp"]
INFINIBAND = Path("/sys/class/infiniband")

# Queue pairs a connection: several give ECMP several paths to hash to. 4 is the low end of 4-16.
_ROCE_QUEUE_PAIRS = 4


@dataclass(frozen=True)
class Setting:
    """One variable and the reason for its value."""

    name: str
    value: str | None
    """None: left to NCCL"""
    why: str
    decides: bool = False
    """whether another value would make it another fabric"""


@dataclass(frozen=True)
class Port:
    """One port of an RDMA adapter as the kernel shows it."""

    adapter: str
    number: int
    link_layer: str
    state: str
    rate: str
    roce_v2_gids: tuple[int, ...]

    @property
    def active(self) -> bool:
        return "ACTIVE" in self.state

    @property
    def name(self) -> str:
        return f"{self.adapter}:{self.number}"


def settings(fabric: Fabric, infiniband: Path = INFINIBAND) -> list[Setting]:
    """The variables of `fabric` on this host, whose adapters lie below `infiniband`."""
    if fabric == "tcp":
        return [
            Setting("NCCL_IB_DISABLE", "1", "no RDMA: the control of the comparison", True),
            Setting("NCCL_NET", "Socket", "TCP sockets", True),
        ]
    layer = "InfiniBand" if fabric == "ib" else "Ethernet"
    ports = [port for port in rdma_ports(infiniband) if port.link_layer == layer and port.active]
    names = ",".join(port.name for port in ports)
    common = [
        Setting("NCCL_IB_DISABLE", "0", "RDMA", True),
        Setting("NCCL_NET", "IB", "fail where RDMA does not work, do not fall back to TCP", True),
        Setting(
            "NCCL_IB_HCA",
            f"={names}" if names else None,
            f"the active ports whose link layer is {layer}"
            if names
            else f"no active {layer} port below {infiniband}",
        ),
    ]
    if fabric == "ib":
        why = "the subnet manager's adaptive routing, the default on InfiniBand, made explicit"
        return [*common, Setting("NCCL_IB_ADAPTIVE_ROUTING", "1", why)]
    gids = {port.roce_v2_gids[-1:] for port in ports}
    same = len(gids) == 1 and gids != {()}
    return [
        *common,
        Setting(
            "NCCL_IB_GID_INDEX",
            str(ports[0].roce_v2_gids[-1]) if same else None,
            "the RoCE v2 address that all these ports hold (show_gids)"
            if same
            else "no one RoCE v2 address index fits all ports: NCCL chooses by NCCL_IB_ADDR_FAMILY",
        ),
        Setting(
            "NCCL_IB_TC",
            None,
            "the traffic class that the switches treat as lossless: export the site's own",
        ),
        Setting(
            "NCCL_IB_QPS_PER_CONNECTION", str(_ROCE_QUEUE_PAIRS), "several paths for ECMP to choose"
        ),
        Setting("NCCL_IB_SPLIT_DATA_ON_QPS", "1", "each message over all of them, not one in turn"),
    ]


def apply(wanted: list[Setting], environment: MutableMapping[str, str]) -> list[str]:
    """Set the variables that `environment` does not hold yet; one line to print for each.

    InputError where it already holds another value of a variable that decides on the fabric.
    """
    lines = []
    for setting in wanted:
        present = environment.get(setting.name)
        if present is not None and setting.decides and present != setting.value:
            raise InputError(
                f"{setting.name}={present} is exported, the preset needs {setting.value} "
                f"({setting.why}): unset it or choose another preset"
            )
        if present is not None and present != setting.value:
            lines.append(f"{setting.name}={present} (exported; the preset: {setting.value})")
        elif setting.value is None:
            lines.append(f"{setting.name} not set ({setting.why})")
        else:
            environment[setting.name] = setting.value
            lines.append(f"{setting.name}={setting.value} ({setting.why})")
    return lines


def rdma_ports(infiniband: Path = INFINIBAND) -> list[Port]:
    """Ports of all RDMA adapters, from sysfs; empty where there are none."""
    return [_port(folder) for folder in sorted(infiniband.glob("*/ports/[0-9]*"))]


def _port(folder: Path) -> Port:
    types = folder / "gid_attrs" / "types"
    found = [
        int(file.name)
        for file in (types.iterdir() if types.is_dir() else [])
        if file.name.isdigit()
        and _read(file) == "RoCE v2"
        # Only an IPv4 address, mapped into IPv6, is routed without more configuration.
        and ":0000:ffff:" in _read(folder / "gids" / file.name)
    ]
    return Port(
        folder.parents[1].name,
        int(folder.name),
        _read(folder / "link_layer"),
        _read(folder / "state"),
        _read(folder / "rate"),
        tuple(sorted(found)),
    )


def _read(file: Path) -> str:
    # Entries of an empty GID table answer EINVAL.
    try:
        return file.read_text().strip()
    except OSError:
        return ""
