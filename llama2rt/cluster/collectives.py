"""How long a collective takes: NCCL's own cost model, corrected by what was measured.

NCCL picks algorithm and protocol by predicting, for each pair, latency + bytes / bandwidth
(NVIDIA/nccl, src/graph/tuning.cc); `options` computes the same table, so that the model switches
from tree to ring and from LL to Simple where NCCL does. Measurements show two costs that the table
does not have, and `time` adds them: the launch, and the first chunk, which must travel through the
whole ring or tree before data streams. One latency for all sizes would be wrong by a third for
small or for large ones.

Left out: NVLink SHARP, SHARP in InfiniBand switches, CollNet and PAT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from typing import Literal, get_args

from llama2rt.cluster.hardware import Fabric, Gpu
from llama2rt.errors import InputError

Operation = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
Algorithm = Literal["ring", "tree"]
Protocol = Literal["LL", "LL128", "Simple"]

_MICRO = 1e-6
# tuning.cc, NCCL 2.18-2.21: base latency, latency of an NVLink hop and of a network hop, in
# microseconds.
_BASE = {
    "tree": {"LL": 6.8, "LL128": 14.0, "Simple": 8.4},
    "ring": {"LL": 6.6, "LL128": 14.0, "Simple": 8.4},
}
_NVLINK = {
    "tree": {"LL": 0.6, "LL128": 1.25, "Simple": 4.0},
    "ring": {"LL": 0.6, "LL128": 1.9, "Simple": 3.4},
}
_NETWORK = {
    "tree": {"LL": 5.0, "LL128": 8.5, "Simple": 14.0},
    "ring": {"LL": 2.7, "LL128": 4.0, "Simple": 14.0},
}
# Share of the bus bandwidth that a protocol carries as payload.
_PAYLOAD = {
    "tree": {"LL": 0.92 / 3.8, "LL128": 0.92 * 120 / 128, "Simple": 0.92},
    "ring": {"LL": 0.5, "LL128": 0.92, "Simple": 1.0},
}
_HOST_OVERHEAD_MICROSECONDS = 2.0  # AMD hosts, as in DGX A100; 1 on Intel
_RING_SIMPLE_NETWORK = 1.4  # multi-node ring all-reduce in Simple

# Measured, 8 A100 on NVSwitch (superbenchmark): an all-reduce of a few bytes takes 34.7 us, where
# the table says 15.0 (ring, LL); from 4 MB up the intercept is 89 us, where it says 31-56.
_LAUNCH_SECONDS = 19.7e-6
_FILL_SECONDS, _FILL_BYTES = 24e-6, 4 * 2**20
# 229.5 GB/s is the slope from 4 MB; neither figure has a published range: 8 GiB all-reduces of
# the same logs lie 2.5 % above it, all-to-alls 2.3 % below.
RELATIVE_RANGE = 0.10
PROVENANCE = (
    "NCCL's cost model (tuning.cc); launch and first chunk as measured on 8 A100 over NVSwitch, "
    "network at 97.5 % of line rate less collisions"
)


@dataclass(frozen=True)
class Group:
    """Ranks that take part in a collective, as many in each node, each with a NIC of its own."""

    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        return ceil(self.ranks / self.ranks_per_node)


@dataclass(frozen=True)
class Timing:
    """One line of NCCL's table, or the prediction made from it."""

    seconds: float
    algorithm: Algorithm
    protocol: Protocol


def group(gpus: int, gpus_per_node: int = 8) -> Group:
    """All GPUs of a cluster; InputError unless they fill whole nodes or fit in one."""
    if gpus < 2:
        raise InputError(f"gpus: a collective needs at least 2, got {gpus}")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise InputError(f"gpus: expected a multiple of {gpus_per_node}, got {gpus}")
    return Group(gpus, min(gpus, gpus_per_node))


def bus_factor(operation: Operation, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth, as nccl-tests defines it (doc/PERFORMANCE.md)."""
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return 1.0 if operation == "broadcast" else (ranks - 1) / ranks


def bus_bandwidth_bytes_per_s(gpu: Gpu, fabric: Fabric, where: Group) -> float:
    """What a rank moves in a large ring: its NVLinks, or its node's NICs where those are slower.

    A ring enters and leaves a node through as many NICs as the group has ranks there.
    """
    if where.nodes == 1:
        return gpu.nvlink_bus_bandwidth_bytes_per_s
    network = fabric.nic_bandwidth_bytes_per_s(gpu) * where.ranks_per_node
    return min(gpu.nvlink_bus_bandwidth_bytes_per_s, network)


def options(
    operation: Operation, size_bytes: float, gpu: Gpu, fabric: Fabric, where: Group
) -> list[Timing]:
    """NCCL's table for one call: each algorithm and protocol with the time NCCL expects.

    size_bytes is the total buffer S of nccl-tests (for an all-gather the gathered one).
    """
    bandwidth = bus_bandwidth_bytes_per_s(gpu, fabric, where)
    algorithms: Sequence[Algorithm] = ("ring", "tree") if operation == "all_reduce" else ("ring",)
    protocols: tuple[Protocol, ...] = get_args(Protocol)
    if operation == "all_to_all":
        protocols = ("Simple",)  # grouped sends and receives know no other
    return [
        Timing(
            _latency(operation, algorithm, protocol, fabric, where)
            + size_bytes
            * _per_byte(operation, algorithm, where)
            / (bandwidth * _PAYLOAD[algorithm][protocol]),
            algorithm,
            protocol,
        )
        for algorithm in algorithms
        for protocol in protocols
    ]


def time(operation: Operation, size_bytes: float, gpu: Gpu, fabric: Fabric, where: Group) -> Timing:
    """Predicted time of one call, by the algorithm and protocol that NCCL would pick.

    InputError for a size below 1 byte or several nodes without a network.
    """
    if size_bytes < 1:
        raise InputError(f"bytes: expected at least 1, got {size_bytes:g}")
    if where.nodes > 1 and not fabric.line_rate_share:
        raise InputError(f"fabric: {fabric.name} ends at a node, got {where.nodes} nodes")
    picked = min(
        options(operation, size_bytes, gpu, fabric, where), key=lambda option: option.seconds
    )
    untabled = _LAUNCH_SECONDS + _FILL_SECONDS * min(1.0, size_bytes / _FILL_BYTES)
    return Timing(picked.seconds + untabled, picked.algorithm, picked.protocol)


def seconds(
    operation: Operation, size_bytes: float, gpu: Gpu, fabric: Fabric, where: Group
) -> float:
    """`time` where only the duration matters; 0 for a group of one."""
    if where.ranks == 1 or size_bytes == 0:
        return 0.0
    return time(operation, size_bytes, gpu, fabric, where).seconds


def _per_byte(operation: Operation, algorithm: Algorithm, where: Group) -> float:
    """Bytes each rank sends for a byte of the buffer."""
    return 2.0 if algorithm == "tree" else bus_factor(operation, where.ranks)


def _latency(
    operation: Operation, algorithm: Algorithm, protocol: Protocol, fabric: Fabric, where: Group
) -> float:
    """Seconds before the first byte has been everywhere, by tuning.cc."""
    base, nvlink = _BASE[algorithm][protocol], _NVLINK[algorithm][protocol]
    network = _NETWORK[algorithm][protocol] + fabric.extra_hop_seconds / _MICRO
    if algorithm == "tree":
        hops = (where.ranks_per_node - 1) * nvlink + floor(log2(where.nodes)) * network
        return (base + 2 * hops) * _MICRO
    rounds = 2 if operation == "all_reduce" else 1
    steps, crossing = rounds * (where.ranks - 1), rounds * (where.nodes - 1)
    if where.nodes > 1:
        overhead = _HOST_OVERHEAD_MICROSECONDS * (3 if protocol == "Simple" else 1)
        nvlink = max(nvlink, overhead)
    latency = base + (steps - crossing) * nvlink + crossing * network
    if where.nodes > 1 and operation == "all_reduce" and protocol == "Simple":
        latency *= _RING_SIMPLE_NETWORK
    return latency * _MICRO
