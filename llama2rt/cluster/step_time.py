"""How long a training step takes: a time for each kind of work, added up along the critical path.

Matrix products cost FLOPs at a share of the peak plus the bytes they move; attention its FLOPs at
the share its kernel reaches; norms, activations and residuals cost bytes. Communication costs what
`collectives` says and hides behind computation as far as the software of the time lets it. The
constants are in `calibration`: one set for every model, GPU and fabric.

Left out: data loading, checkpoints, evaluation and failures, which published rates of whole
training runs contain, and imbalance from packing.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log, pi, sqrt

from llama2rt.cluster import collectives, power_curve
from llama2rt.cluster.collectives import Group
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.workload import BF16_BYTES, Layout, Shape, shard_ranks


@dataclass(frozen=True)
class Constants:
    """What the published runs calibrate; `calibration.FITTED` holds the values and their fit."""

    gemm_share_of_peak: float
    """of large bf16 products, before the bytes that they move"""
    traffic_2021: float
    """bytes moved by norms, residuals and activations over the least possible"""
    traffic_2023: float
    gathered_share_of_nic: float
    """ZeRO-3 of 2021: the share of its own NIC's rate at which a GPU gathers"""
    overlap_2021: float
    """share of computation behind which ZeRO-3's traffic hides"""
    overlap_2023: float
    speed_spread: float
    """coefficient of variation of GPUs' speeds within a step"""


# Of the data sheet's bandwidth: what a long copy reaches (STREAM-like kernels on an A100).
_HBM_SHARE = 0.85
# Collectives run on multiprocessors: 24 of an A100's 108, lost to the work they hide behind.
_NCCL_SHARE_OF_GPU = 0.2
# Bytes that FSDP copies for each gathered parameter and micro-batch, beside what NCCL moves: the
# gathered weights into the parameters, forward and backward (2 read, 2 written, twice), and the
# gradients into one fp32 buffer (2 read, 4 written). pytorch/pytorch pulls 117950 and 117975.
_FSDP_COPY_BYTES = 14
# A launch, and the tail of a kernel whose last wave does not fill the chip.
_KERNEL_SECONDS = 5e-6
# Forward kernels a layer that are neither products nor attention, fused as in Megatron-LM.
_SMALL_KERNELS = 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause; `seconds` is their sum."""

    compute: float
    """matrix products, attention, elementwise work, on the slowest stage"""
    tensor_parallel: float
    """with context parallelism's exchange"""
    pipeline: float
    """bubble, and transfers between stages"""
    data_parallel: float
    """the part of gradients' and sharded weights' traffic that is not hidden"""
    optimizer: float
    stragglers: float

    @property
    def seconds(self) -> float:
        return (
            self.compute
            + self.tensor_parallel
            + self.pipeline
            + self.data_parallel
            + self.optimizer
            + self.stragglers
        )


@dataclass(frozen=True)
class _Pass:
    """One layer's work for one micro-batch, forward; seconds at the largest power cap."""

    products: float
    attention: float
    attention_backward: float
    elementwise: float
    gathers: float
    """tensor-parallel collectives"""
    context: float
    """keys and values gathered over the ranks that share a sequence"""


def step_time(
    shape: Shape,
    layout: Layout,
    cluster: Cluster,
    constants: Constants,
    cap_curve: power_curve.Workload = "matmul",
) -> StepTime:
    """Seconds of one optimizer step; the layout must have passed `Layout.check`.

    cap_curve: what a power cap does to matrix products; "mixed" is the other end of its range.
    """
    layer = _layer(shape, layout, cluster, constants)
    matrix = power_curve.relative_throughput(cap_curve, cluster.watts, cluster.gpu).value
    memory = power_curve.relative_throughput("memory", cluster.watts, cluster.gpu).value
    busy = _layer_seconds(layer, layout, matrix, memory)
    again = 1 if layout.recompute == "full" else 0
    # Forward, backward (where keys are gathered and their gradients scattered) and recomputation.
    exchange = (2 + again) * layer.gathers + (3 + again) * layer.context
    head = _head(shape, layout, cluster, constants, matrix, memory)
    layers = shape.layers / layout.pp
    fullest, batches = ceil(layers), layout.micro_batches
    # The last stage also predicts: it is the slowest unless its share of the layers is smaller.
    stage_busy = max(fullest * busy, int(layers) * busy + head)
    compute = batches * stage_busy
    bubble = (layout.pp - 1) / layout.interleave * layers * (busy + exchange)
    transfers = batches * _stage_transfer(shape, layout, cluster)
    optimizer = _optimizer(shape, layout, cluster)
    exposed = _exposed(shape, layout, cluster, constants, compute)
    slowest = constants.speed_spread * expected_largest(cluster.gpus)
    jitter = cluster.fabric.jitter * expected_largest(cluster.gpus) * exposed
    return StepTime(
        compute,
        batches * fullest * exchange,
        bubble + transfers,
        exposed,
        optimizer,
        slowest * compute + jitter,
    )


def expected_largest(n: int) -> float:
    """Mean of the largest of n standard normal draws, to first order (Cramer 1946, 28.6.16)."""
    if n < 2:
        return 0.0
    root = sqrt(2 * log(n))
    return max(0.0, root - (log(log(n)) + log(4 * pi)) / (2 * root)) + 0.5772 / root


@lru_cache(maxsize=4096)
def _layer(shape: Shape, layout: Layout, cluster: Cluster, constants: Constants) -> _Pass:
    gpu, tp = cluster.gpu, layout.tp
    tokens = layout.micro_batch * layout.seq / layout.cp
    products = sum(
        _product(tokens, rows, columns, cluster, constants)
        for rows, columns in (
            (shape.dim, (shape.dim + 2 * shape.kv_dim) / tp),
            (shape.dim / tp, shape.dim),
            (shape.dim, (shape.ffn_matrices - 1) * shape.ffn_hidden / tp),
            (shape.ffn_hidden / tp, shape.dim),
        )
    )
    attention, backward = _attention(shape, layout, cluster, constants, tokens)
    moved = _elementwise_bytes(shape, layout, tokens) * (
        constants.traffic_2021 if layout.stack == "2021" else constants.traffic_2023
    )
    elementwise = moved / _hbm(cluster) + _SMALL_KERNELS * _KERNEL_SECONDS
    exchanged = BF16_BYTES * tokens * shape.dim
    keys = BF16_BYTES * 2 * tokens * layout.cp * shape.kv_dim / tp
    return _Pass(
        products,
        attention,
        backward,
        elementwise,
        2
        * collectives.seconds(
            "all_reduce", exchanged, gpu, cluster.fabric, Group(tp, min(tp, cluster.gpus_per_node))
        ),
        collectives.seconds("all_gather", keys, gpu, cluster.fabric, Group(layout.cp, layout.cp)),
    )


def _layer_seconds(layer: _Pass, layout: Layout, matrix: float, memory: float) -> float:
    """Forward and backward of one layer, with what is computed again."""
    forward_again = 1 if layout.recompute == "full" else 0
    attention_again = 0 if layout.recompute == "none" else 1
    products = (3 + forward_again) * layer.products
    if layout.recompute == "selective" and layout.fsdp:
        # torchtitan's policy keeps attention and every second product, and repeats the rest.
        attention_again = 0
        products += layer.products / 2
    attention = (1 + attention_again) * layer.attention + layer.attention_backward
    elementwise = (3 + forward_again) * layer.elementwise
    return (products + attention) / matrix + elementwise / memory


def _product(
    tokens: float, rows: float, columns: float, cluster: Cluster, constants: Constants
) -> float:
    """Seconds of a product [tokens, rows] x [rows, columns] in bf16."""
    flops = 2 * tokens * rows * columns
    moved = BF16_BYTES * (tokens * rows + rows * columns + tokens * columns)
    rate = _matmul_rate(cluster, constants)
    return flops / rate + moved / _hbm(cluster) + _KERNEL_SECONDS


def _attention(
    shape: Shape, layout: Layout, cluster: Cluster, constants: Constants, tokens: float
) -> tuple[float, float]:
    """Seconds of the attention core, forward and backward."""
    flops = 4 * tokens * layout.seq * shape.dim / layout.tp
    if layout.stack != "2021":
        gpu = cluster.gpu
        share = gpu.attention_share_2023 if layout.stack == "2023" else gpu.attention_share_2024
        rate = gpu.peak_flops_per_s * share
        # The causal half; the backward recomputes the scores: five products for two.
        forward = flops / 2 / rate + _KERNEL_SECONDS
        return forward, 2.5 * forward
    # Scores [heads, seq, seq] written and read: product, mask and softmax, dropout, product.
    scores = BF16_BYTES * tokens * layout.seq * shape.heads / layout.tp
    products = flops / _matmul_rate(cluster, constants)
    forward = products + 6.5 * scores / _hbm(cluster) + 4 * _KERNEL_SECONDS
    return forward, 2 * products + 9 * scores / _hbm(cluster) + 6 * _KERNEL_SECONDS


def _elementwise_bytes(shape: Shape, layout: Layout, tokens: float) -> float:
    """Least bytes that norms, residuals and activations of a layer move, forward."""
    norms = 2 * 2 * shape.dim
    residuals = 2 * 3 * shape.dim
    unsplit = (norms + residuals) / (layout.tp if layout.sequence_parallel else 1)
    rotated = 2 * (shape.dim + shape.kv_dim)  # queries and keys; GPT's are reshaped instead
    activation = shape.ffn_matrices * shape.ffn_hidden
    return BF16_BYTES * tokens * (unsplit + (rotated + activation) / layout.tp)


def _head(
    shape: Shape,
    layout: Layout,
    cluster: Cluster,
    constants: Constants,
    matrix: float,
    memory: float,
) -> float:
    """Embedding, output projection and loss, forward and backward."""
    tokens = layout.micro_batch * layout.seq / layout.cp
    columns = shape.vocab_size / layout.tp
    product = _product(tokens, shape.dim, columns, cluster, constants)
    # Logits in fp32: written, read twice for the loss, gradient written and read.
    loss = 18 * tokens * columns / _hbm(cluster)
    return 3 * product / matrix + loss / memory


def _stage_transfer(shape: Shape, layout: Layout, cluster: Cluster) -> float:
    """Seconds to hand one micro-batch's activations and gradients to the neighbouring stages."""
    if layout.pp == 1:
        return 0.0
    tokens = layout.micro_batch * layout.seq / layout.cp
    size = BF16_BYTES * tokens * shape.dim / layout.tp  # scatter-gather of Narayanan et al. 2021
    if layout.tp * layout.pp <= cluster.gpus_per_node:
        rate = cluster.gpu.nvlink_bus_bandwidth_bytes_per_s
    else:
        rate = cluster.fabric.nic_bandwidth_bytes_per_s(cluster.gpu)
    return 2 * layout.interleave * size / rate


def _optimizer(shape: Shape, layout: Layout, cluster: Cluster) -> float:
    """Gradient norm and AdamW: bytes of fp32 weights and moments, gradients and bf16 weights."""
    owned = shape.parameters / (layout.tp * layout.pp)
    if layout.sharding != "none":
        owned /= shard_ranks(layout, cluster.gpus_per_node)
    return owned * (24 + 4 + 4 + BF16_BYTES) / _hbm(cluster)


def _exposed(
    shape: Shape, layout: Layout, cluster: Cluster, constants: Constants, compute: float
) -> float:
    """Seconds of data-parallel traffic that computation does not hide."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    per_node = max(1, min(ranks, cluster.gpus_per_node // layout.tp))
    whole = Group(ranks, per_node)
    weights = BF16_BYTES * shape.parameters / (layout.tp * layout.pp)
    overlap = constants.overlap_2021 if layout.stack == "2021" else constants.overlap_2023
    gpu, fabric = cluster.gpu, cluster.fabric

    def moved(operation: collectives.Operation, size: float, where: Group) -> float:
        return collectives.seconds(operation, size, gpu, fabric, where)

    if not layout.gathers:
        if layout.sharding == "none":
            traffic = moved("all_reduce", weights, whole)
        else:
            traffic = moved("reduce_scatter", weights, whole) + moved("all_gather", weights, whole)
        # Gradients leave during the last micro-batch's backward; in 2021 only after it.
        hidden = (
            0.0 if layout.stack == "2021" else overlap * compute / max(1.0, layout.micro_batches)
        )
        return _unhidden(traffic, hidden, layout)
    if layout.sharding == "hybrid":
        inside = Group(shard_ranks(layout, cluster.gpus_per_node), per_node)
        share = weights / inside.ranks
        across = moved("all_reduce", share, Group(max(1, whole.nodes), 1))
    else:
        inside, across = whole, 0.0
    traffic = ceil(layout.micro_batches) * _sharded_traffic(
        shape, layout, cluster, constants, inside
    )
    copied = 0.0
    if layout.fsdp:
        copied = ceil(layout.micro_batches) * _FSDP_COPY_BYTES * weights / BF16_BYTES
    return copied / _hbm(cluster) + _unhidden(traffic + across, overlap * compute, layout)


def _unhidden(traffic: float, cover: float, layout: Layout) -> float:
    """Seconds that `traffic` adds to a step which has `cover` seconds of work to hide it behind."""
    contention = 0.0 if layout.stack == "2021" else _NCCL_SHARE_OF_GPU
    return max(0.0, traffic - cover) + contention * min(traffic, cover)


def _sharded_traffic(
    shape: Shape, layout: Layout, cluster: Cluster, constants: Constants, where: Group
) -> float:
    """ZeRO-3, one micro-batch: weights gathered forward and backward, gradients scattered."""
    if where.ranks == 1:
        return 0.0
    units = ceil(shape.layers / layout.pp) + 1
    unit = BF16_BYTES * shape.parameters / (layout.tp * layout.pp) / units
    gpu, fabric = cluster.gpu, cluster.fabric
    if layout.stack == "2021" and where.nodes > 1:
        rate = fabric.nic_bandwidth_bytes_per_s(gpu) * constants.gathered_share_of_nic
        return 3 * unit * units / rate
    gather = collectives.seconds("all_gather", unit, gpu, fabric, where)
    scatter = collectives.seconds("reduce_scatter", unit, gpu, fabric, where)
    return units * (2 * gather + scatter)


def _matmul_rate(cluster: Cluster, constants: Constants) -> float:
    gpu = cluster.gpu
    return gpu.peak_flops_per_s * gpu.matmul_share_of_a100 * constants.gemm_share_of_peak


def _hbm(cluster: Cluster) -> float:
    return cluster.gpu.memory_bandwidth_bytes_per_s * _HBM_SHARE
