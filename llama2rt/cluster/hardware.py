"""What a cluster is made of: GPUs, nodes, fabrics, with every figure's unit in its name.

Each number is a vendor's or a published measurement, named beside it. Nothing here is fitted to a
training run; those constants are in `calibration`.
"""

from dataclasses import dataclass, replace

from llama2rt.cluster import congestion
from llama2rt.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator. Bandwidths are in one direction."""

    name: str
    peak_flops_per_s: float
    """dense bf16"""
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    nvlink_bus_bandwidth_bytes_per_s: float
    """what an all-reduce over 8 GPUs reaches"""
    nic_line_rate_bytes_per_s: float
    """of the NIC that a node of this generation has for each GPU"""
    max_watts: float
    min_watts: float
    attention_share_2023: float
    """share of the peak, over causal FLOPs, of FlashAttention's forward and backward"""
    attention_share_2024: float
    """the same of FlashAttention-2 or cuDNN's kernels"""
    matmul_share_of_a100: float = 1.0
    """best products, as a share of the peak, over the same on an A100"""


# NVIDIA data sheet. 229.5 GB/s bus bandwidth: 8-GPU NVSwitch all-reduce from 4 MB up in
# superbenchmark's test logs. Attention: FlashAttention reaches 80-100 of 312 TFLOP/s at head
# dimension 128, causal (Dao 2023, figure 5); its second version 50-73 % (abstract; the low end,
# since backward is slower).
_A100 = Gpu(
    name="a100-80gb",
    peak_flops_per_s=312e12,
    memory_bytes=80 * GIB,
    memory_bandwidth_bytes_per_s=2.039e12,
    nvlink_bus_bandwidth_bytes_per_s=229.5e9,
    nic_line_rate_bytes_per_s=25e9,
    max_watts=400.0,
    min_watts=100.0,
    attention_share_2023=0.30,
    attention_share_2024=0.50,
)
# Data sheet. Bus bandwidth is A100's times the ratio of the NVLink rates (450 to 300 GB/s), an
# assumption that leaves NVLink SHARP out. Attention: FlashAttention-2 reaches 0.35 (Shah et al.
# 2024, abstract); the first version, written for A100, keeps as much of its share there as the
# second does (0.35 of 0.73). Products: the best measured are 792.1 of 989 TFLOP/s against 267.9 of
# 312 (stas00/ml-engineering, "Maximum Achievable Matmul FLOPS").
_H100 = Gpu(
    name="h100",
    peak_flops_per_s=989.4e12,
    memory_bytes=80 * GIB,
    memory_bandwidth_bytes_per_s=3.35e12,
    nvlink_bus_bandwidth_bytes_per_s=229.5e9 * 1.5,
    nic_line_rate_bytes_per_s=50e9,
    max_watts=700.0,
    min_watts=200.0,
    attention_share_2023=0.30 * 0.48,
    attention_share_2024=0.35,
    matmul_share_of_a100=0.93,
)
GPUS = {
    gpu.name: gpu
    for gpu in (
        replace(
            _A100,
            name="a100-40gb",
            memory_bytes=40 * GIB,
            memory_bandwidth_bytes_per_s=1.555e12,
        ),
        _A100,
        _H100,
        # Data sheet: H100's chip, NVLink and power with more and faster memory.
        replace(
            _H100,
            name="h200",
            memory_bytes=141e9,
            memory_bandwidth_bytes_per_s=4.8e12,
        ),
    )
}


@dataclass(frozen=True)
class Fabric:
    """The network between nodes."""

    name: str
    line_rate_share: float
    """what one NIC moves of its line rate when it is the only one"""
    collisions: float
    """share that is left when flows collide on uplinks (1: none collide)"""
    extra_hop_seconds: float
    """what a switch hop adds to an InfiniBand hop"""
    jitter: float
    """coefficient of variation of a rank's communication time"""
    rate_scale: float = 1.0
    """of the NIC that the GPU's generation comes with"""

    def nic_bandwidth_bytes_per_s(self, gpu: Gpu) -> float:
        """Bytes a second through one NIC under load, one direction."""
        rate = gpu.nic_line_rate_bytes_per_s * self.rate_scale
        return rate * self.line_rate_share * self.collisions


# A rack of 16 hosts hashed onto 16 uplinks: with 16 queue pairs a connection, what well-set NCCL
# on RoCE uses, about two thirds is left, which is what untuned clusters report (65-75 % of line
# rate, nccl issues 495 and 700). The range runs from 4 queue pairs to twice the uplinks.
ROCE_HOSTS, ROCE_QUEUE_PAIRS, ROCE_UPLINKS = 16, 16, 16


def _roce(queue_pairs: int, uplinks: int) -> Fabric:
    return Fabric(
        "roce",
        line_rate_share=0.975,
        collisions=congestion.efficiency(queue_pairs, uplinks, hosts=ROCE_HOSTS),
        # End to end 2-4 us against 1-1.5 us on InfiniBand; NCCL's network hop is InfiniBand's.
        extra_hop_seconds=1.75e-6,
        jitter=0.05,
    )


# 24.37 GB/s through one HDR NIC at 8 MB (superbenchmark) is 97.5 % of 25 GB/s; adaptive routing
# leaves no collisions. Jitter has no public measurement: assumptions, on the wide side for RoCE.
IB = Fabric("ib", line_rate_share=0.975, collisions=1.0, extra_hop_seconds=0.0, jitter=0.02)
ROCE = _roce(ROCE_QUEUE_PAIRS, ROCE_UPLINKS)
ROCE_LOW = replace(_roce(4, ROCE_UPLINKS), extra_hop_seconds=3e-6, jitter=0.10)
ROCE_HIGH = replace(_roce(ROCE_QUEUE_PAIRS, 2 * ROCE_UPLINKS), extra_hop_seconds=1e-6, jitter=0.02)
# Published figures of a fabric: (low, default, high). A fabric that is not here has no range.
RANGES = {"roce": (ROCE_LOW, ROCE, ROCE_HIGH)}
# One node, nothing between: any collective over more GPUs than a node has is refused.
NVLINK = Fabric("nvlink", line_rate_share=0.0, collisions=1.0, extra_hop_seconds=0.0, jitter=0.0)
FABRICS = {fabric.name: fabric for fabric in (NVLINK, IB, ROCE)}
# Published tables name their networks by product.
ALIASES = {"infiniband": "ib", "hdr": "ib", "ndr": "ib", "nvswitch": "nvlink", "rocev2": "roce"}


@dataclass(frozen=True)
class Cluster:
    """`gpus` GPUs of one kind in nodes of `gpus_per_node`, one NIC a GPU, under one power cap."""

    gpu: Gpu
    gpus: int
    fabric: Fabric
    watts: float
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise InputError(f"gpus: expected at least 1, got {self.gpus}")
        if not self.gpu.min_watts <= self.watts <= self.gpu.max_watts:
            raise InputError(
                f"watts: {self.gpu.name} takes caps of {self.gpu.min_watts:g}-"
                f"{self.gpu.max_watts:g} W, got {self.watts:g}"
            )
        if self.fabric.name == "nvlink" and self.gpus > self.gpus_per_node:
            raise InputError(
                f"fabric: nvlink joins the {self.gpus_per_node} GPUs of a node, got "
                f"{self.gpus} GPUs: expected ib or roce"
            )


def gpu(name: str) -> Gpu:
    """The GPU of that name; InputError if there is none."""
    if name.lower() not in GPUS:
        raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]


def fabric(name: str) -> Fabric:
    """The fabric of that name or product name; InputError if there is none."""
    name = ALIASES.get(name.lower(), name.lower())
    if name not in FABRICS:
        raise InputError(f"fabric: expected one of {', '.join(FABRICS)}, got {name!r}")
    return FABRICS[name]
