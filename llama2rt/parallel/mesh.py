"""Which process has which part: the device mesh of a recipe's `[parallel]` table.

Ranks of different `data` and `shard` coordinates see different micro-batches; those that differ in
`context`, `tensor` or `pipeline` alone work on the same one.
"""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama2rt.errors import InputError
from llama2rt.model import LlamaConfig
from llama2rt.parallel import faults
from llama2rt.parallel.options import DIMENSIONS, ParallelOptions
from llama2rt.parallel.world import until_stop, world

BATCH = ("shard", "data")
"""dimensions whose ranks work on different micro-batches"""


@dataclass(frozen=True)
class Mesh:
    """The processes of a job by what they share. `Mesh.single()` is one process."""

    degrees: dict[str, int]
    """processes along each of DIMENSIONS"""
    devices: DeviceMesh | None
    """with DIMENSIONS as its names; None in one process"""
    fsdp: DeviceMesh | None
    """what `fully_shard` takes: shard x context flattened, under data where there are replicas;
    None where nothing is to be sharded or replicated"""

    @classmethod
    def single(cls) -> Self:
        """One process."""
        return cls(dict.fromkeys(DIMENSIONS, 1), None, None)

    @classmethod
    def build(
        cls, options: ParallelOptions, config: LlamaConfig, *, pipelined: bool = False
    ) -> Self:
        """The mesh of all processes of this job, called by each of them. `pipelined`: whether its
        stage of training can be a pipeline. InputError where the degrees do not fit the number of
        processes, the model's shape or the stage."""
        degrees = options.degrees(world().size)
        check(degrees, config, pipelined=pipelined)
        if world().size == 1:
            return cls.single()
        devices, fsdp = _devices(*degrees.values())
        faults.set_limit(datetime.timedelta(minutes=options.timeout_minutes))
        return cls(degrees, devices, fsdp)

    @property
    def tensor_alone(self) -> Self:
        """Of these processes those that this one shares every matrix with, and no others."""
        degrees = dict.fromkeys(DIMENSIONS, 1) | {"tensor": self.degrees["tensor"]}
        return replace(self, degrees=degrees, fsdp=None)

    @property
    def batch_ranks(self) -> int:
        """How many different micro-batches are worked on at a time."""
        return self.degrees["data"] * self.degrees["shard"]

    @property
    def batch_rank(self) -> int:
        """Which of them is this process's."""
        return self.index("data") * self.degrees["shard"] + self.index("shard")

    @property
    def share(self) -> tuple[int, int]:
        """(batch_rank, batch_ranks), as the loaders of `data.loader` take it."""
        return self.batch_rank, self.batch_ranks

    def index(self, dimension: str) -> int:
        """This process's coordinate along one of DIMENSIONS."""
        return 0 if self.devices is None else self.devices.get_local_rank(dimension)

    def sum(self, values: Tensor, dimensions: Iterable[str] = BATCH) -> Tensor:
        """`values` summed, in place, over the ranks that differ in `dimensions`: as they stand,
        those that work on other micro-batches. The same bits on each of them."""
        for dimension in dimensions:
            if (group := self.group(dimension)) is not None:
                dist.all_reduce(values, group=group)
        return values

    def totals(self, numbers: Iterable[float]) -> list[float]:
        """Python numbers summed over the ranks that work on other micro-batches, in fp64."""
        given = list(numbers)
        if self.batch_ranks == 1:
            return given
        return self.sum(torch.tensor(given, dtype=torch.float64, device=world().device)).tolist()

    def along(self, dimension: str) -> DeviceMesh | None:
        """What `group` is the group of, for whoever keeps it: a group that anybody keeps outlives
        the end of the job, and gloo's threads then abort the process."""
        if self.devices is None or self.degrees[dimension] == 1:
            return None
        return self.devices[dimension]

    def group(self, dimension: str) -> dist.ProcessGroup | None:
        """The processes that differ from this one in `dimension` alone; None where it is alone."""
        if self.devices is None or self.degrees[dimension] == 1:
            return None
        return self.devices.get_group(dimension)


@until_stop
def _devices(*degrees: int) -> tuple[DeviceMesh, DeviceMesh | None]:
    """`devices` and `fsdp` of the Mesh of these degrees, in the order of DIMENSIONS. One for all
    models that are spread alike: a mesh is process groups, which nothing frees before the end."""
    devices = init_device_mesh(world().device.type, degrees, mesh_dim_names=DIMENSIONS)
    _, data, shard, context, _ = degrees
    fsdp = None
    if data * shard * context > 1:
        fsdp = devices["shard", "context"]._flatten("shard_context")
    if data > 1:
        fsdp = devices["data", "shard", "context"]._flatten("data_shard_context")
        fsdp = fsdp._unflatten(0, (data, shard * context), ("replicate", "sharded"))
    return devices, fsdp


def check(
    degrees: Mapping[str, int],
    config: LlamaConfig,
    *,
    pipelined: bool = True,
    adapted: bool = False,
) -> None:
    """InputError naming a degree that a model of this shape cannot be cut by. `pipelined`: whether
    its stage of training can be a pipeline; `adapted`: whether it is trained under an adapter."""
    tensor, pipeline = degrees["tensor"], degrees["pipeline"]
    if pipeline > 1 and not pipelined:
        raise InputError("parallel.pipeline: expected 1, but in pretraining and SFT")
    for name, degree in (("tensor", tensor), ("pipeline", pipeline)):
        if adapted and degree > 1:
            raise InputError(f"parallel.{name}: expected 1 with lora.rank, got {degree}")
    if -(-config.vocab_size // tensor) * (tensor - 1) >= config.vocab_size:
        raise InputError(
            f"parallel.tensor: {tensor} processes cannot share vocab_size {config.vocab_size}: "
            "expected at least one token for the last"
        )
    for name in ("heads", "kv_heads", "ffn_hidden"):
        value = getattr(config, name)
        if value % tensor:
            raise InputError(
                f"parallel.tensor: {tensor} processes cannot share {name} {value}: expected a "
                f"divisor of it"
            )
    if pipeline > config.layers:
        raise InputError(
            f"parallel.pipeline: {pipeline} stages of a model with {config.layers} layers: "
            "expected at least one layer a stage"
        )
    for name in ("tensor", "context"):
        if pipeline > 1 and degrees[name] > 1:
            raise InputError(
                f"parallel.pipeline: does not stack with parallel.{name}: expected 1 of it, got "
                f"{degrees[name]}"
            )
    if pipeline > 1 and config.tied:
        raise InputError(
            "parallel.pipeline: expected a model whose output matrix is not its embedding, which "
            "are at both ends of a pipeline"
        )
