"""The fastest layout of a model on a cluster among those that fit into memory.

Every combination of tensor, pipeline and data parallelism, sharding, recomputation, micro-batch
and interleaving is timed by the step-time model, except layouts that cannot exist or do not fit.
Context parallelism above 1 is tried only where the batch has too few sequences for every GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from llama2rt.cluster import calibration
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.step_time import Constants, step_time
from llama2rt.cluster.workload import (
    RECOMPUTES,
    SHARDINGS,
    Layout,
    Shape,
    Stack,
    fits,
    memory_bytes,
)
from llama2rt.errors import InputError

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_INTERLEAVES = (1, 2, 4)
_LARGEST_PIPELINE = 64


class NoLayout(InputError):
    """No layout of the model fits the cluster: its memory, or its number of GPUs."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and its time."""

    layout: Layout
    step_seconds: float


def search(
    shape: Shape,
    cluster: Cluster,
    seq: int,
    global_batch: int,
    *,
    keep: int = 1,
    constants: Constants = calibration.FITTED,
) -> list[Candidate]:
    """The `keep` fastest layouts, best first; of two equally fast, the one that needs less memory.

    NoLayout where none divides evenly or none fits; the message gives the smallest memory needed.
    """
    possible = list(layouts(shape, cluster, seq, global_batch))
    if not possible:
        raise NoLayout(
            f"{shape.name} on {cluster.gpus} GPUs: no layout splits {shape.layers} layers, "
            f"{shape.heads} heads and a global batch of {global_batch} sequences evenly"
        )
    fitting = [layout for layout in possible if fits(shape, layout, cluster)]
    if not fitting:
        need = min(memory_bytes(shape, layout) for layout in possible) / 1e9
        raise NoLayout(
            f"{shape.name} on {cluster.gpus} {cluster.gpu.name}: no layout fits; the leanest of "
            f"{len(possible)} needs {need:.0f} GB of {cluster.gpu.memory_bytes / 1e9:.0f}"
        )
    timed = [
        Candidate(layout, step_time(shape, layout, cluster, constants).seconds)
        for layout in fitting
    ]
    timed.sort(key=lambda c: (c.step_seconds, memory_bytes(shape, c.layout)))
    return timed[:keep]


def layouts(shape: Shape, cluster: Cluster, seq: int, global_batch: int) -> Iterator[Layout]:
    """All layouts that use every GPU and split the model and the batch evenly.

    On A100 with the software of Llama 2's time, on later GPUs with theirs.
    """
    stack: Stack = "2023" if cluster.gpu.name.startswith("a100") else "2024"
    for tp, pp, cp in product(_tensor(shape, cluster), _pipeline(shape), (1, 2, 4, 8)):
        ranks, rest = divmod(cluster.gpus, tp * pp * cp)
        if rest or not ranks or global_batch % ranks or tp * cp > cluster.gpus_per_node:
            continue
        if cp > 1 and cluster.gpus // (tp * pp) <= global_batch:
            continue  # every GPU has a sequence: nothing to gain from dividing one
        sequences = global_batch // ranks
        shardings = SHARDINGS if ranks * cp > 1 else ("none",)
        whole = Layout(seq, 1, global_batch, tp=tp, pp=pp, dp=ranks, cp=cp, stack=stack)
        for sharding, recompute, size, interleave in product(
            shardings, RECOMPUTES, _MICRO_BATCHES, _INTERLEAVES
        ):
            if size > sequences or sequences % size:
                continue
            if interleave > 1 and (pp == 1 or shape.layers % (pp * interleave)):
                continue
            if pp > 1 and sharding in ("zero3", "hybrid"):
                continue  # there they are zero1
            yield replace(
                whole,
                micro_batch=size,
                sharding=sharding,
                recompute=recompute,
                interleave=interleave,
            )


def _tensor(shape: Shape, cluster: Cluster) -> list[int]:
    """Degrees of tensor parallelism that stay inside a node and divide heads and kv heads."""
    return [
        tp
        for tp in (1, 2, 4, 8)
        if shape.kv_heads % tp == 0 and tp <= min(cluster.gpus_per_node, cluster.gpus)
    ]


def _pipeline(shape: Shape) -> list[int]:
    return [pp for pp in range(1, _LARGEST_PIPELINE + 1) if shape.layers % pp == 0]
