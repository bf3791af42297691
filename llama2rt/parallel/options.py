"""How a model and its batches are spread over processes, as it stands under `[parallel]`."""

import math

from pydantic import BaseModel, ConfigDict, Field

from llama2rt.errors import InputError

# Outermost first. Ranks that talk most are neighbours: a tensor group should lie inside a machine.
DIMENSIONS = ("pipeline", "data", "shard", "context", "tensor")


class ParallelOptions(BaseModel):
    """How many processes share what. Their product is the number that torchrun starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: int = Field(default=1, gt=0)
    """replicas of the sharded model (hybrid sharding); each sees its own part of a batch"""
    shard: int | None = Field(default=None, gt=0)
    """over how many weights, gradients and optimizer state are cut (FSDP); each sees its own part
    of a batch; None for all processes that the other degrees leave"""
    tensor: int = Field(default=1, gt=0)
    """over how many every matrix is cut (tensor parallelism, with sequence parallelism)"""
    context: int = Field(default=1, gt=0)
    """over how many the tokens of a micro-batch are cut"""
    pipeline: int = Field(default=1, gt=0)
    """over how many the layers are cut; pretraining and SFT alone"""

    timeout_minutes: float = Field(default=30, gt=0, allow_inf_nan=False)
    """how long a rank that does not answer, or does not come to a collective, is waited for before
    it is named and the group ends"""

    @property
    def least_ranks(self) -> int:
        """Processes that these degrees need, with `shard` 1 where it is not given."""
        return math.prod((self.data, self.shard or 1, self.tensor, self.context, self.pipeline))

    def degrees(self, ranks: int) -> dict[str, int]:
        """Every dimension's degree among so many processes, in the order of DIMENSIONS. InputError
        where they do not come out."""
        if ranks % self.least_ranks or (self.shard is not None and ranks != self.least_ranks):
            given = ", ".join(
                f"{name} {getattr(self, name)}"
                for name in DIMENSIONS
                if getattr(self, name) not in (None, 1)
            )
            expected = "a multiple of " if self.shard is None else ""
            raise InputError(
                f"parallel: {given or 'the default'} needs {expected}{self.least_ranks} processes, "
                f"got {ranks}"
            )
        shard = self.shard or ranks // self.least_ranks
        return {name: shard if name == "shard" else getattr(self, name) for name in DIMENSIONS}
