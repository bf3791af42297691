"""Models that ranks of one tensor group read together: each holds its part of every matrix.

What samples makes a pass a token and cannot gather weights for each, and one GPU may not hold them
all. So a policy is gathered over replicas and shards, once a phase (`gathered`), or read from its
folder (`load`), and stays cut by tensor: 70B parameters in bf16 are 17 GB on each of 8 ranks, with
an eighth of the keys and values. A group works alone: none waits for another's tokens. Inside it
every rank makes the same passes over the same tokens, so that whatever a rank decides by must be
the same on each: its first rank's choice of tokens (`first`), since equal logits may round to
unequal running sums on GPUs, and the least of their free memory (`least`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llama2rt.checkpoint.files import weights
from llama2rt.checkpoint.load import load_sharded
from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel.collectives import all_gather
from llama2rt.parallel.context import split_micro_batches
from llama2rt.parallel.mesh import Mesh
from llama2rt.parallel.shards import cut, local_part
from llama2rt.parallel.whole import require_room, whole

Model = TypeVar("Model", Llama, ScalarModel)


@contextmanager
def gathered(model: Model, mesh: Mesh, dtype: torch.dtype) -> Iterator[Model]:
    """A frozen copy of a model that is spread over `mesh`, in `dtype`, to sample from and to read,
    gone when the block ends; called by all ranks. Without tensor ranks it is `whole`; with them
    each rank has its part of every matrix, and they read together. InputError as of `whole`."""
    if mesh.degrees["tensor"] == 1:
        with whole(model, dtype) as plain:
            yield plain
        return
    require_room(model, dtype, mesh.degrees["tensor"])
    kind: type[Model] = Llama if isinstance(model, Llama) else ScalarModel
    copy = kind(model.config, "meta", dtype)
    _cut_by_tensor(copy, mesh)
    copy.to_empty(device=next(model.parameters()).device)
    if isinstance(copy, Llama) and copy.config.tied:
        copy.output.weight = copy.transformer.embedding.weight
    _fill(copy, model, mesh)
    _plain(copy)
    copy.train(model.training)
    try:
        yield copy
    finally:
        # Whoever still holds the model, such as an engine, holds no memory by it.
        for parameter in copy.parameters():
            local_part(parameter).detach().untyped_storage().resize_(0)


def load(model: Llama, folder: Path, mesh: Mesh, device: torch.device | str) -> None:
    """Fill a model on the meta device from `folder`, to sample from on `device`: each of the tensor
    ranks of `mesh`, of which there are several, with its part of every matrix. InputError as of
    `load_sharded`, and where the model cannot be cut so."""
    _cut_by_tensor(model, mesh)
    load_sharded(folder, model, device)
    _plain(model)


def _cut_by_tensor(model: Llama | ScalarModel, mesh: Mesh) -> None:
    # Here, because DTensors take a second to import.
    from llama2rt.parallel.tensor import tensor_parallel

    model.requires_grad_(False)
    tensor_parallel(model, mesh)
    split_micro_batches(model, mesh.tensor_alone)


def _plain(model: Llama | ScalarModel) -> None:
    from llama2rt.parallel.tensor import local_weights

    local_weights(model)


@torch.no_grad()
def _fill(copy: Llama | ScalarModel, model: Llama | ScalarModel, mesh: Mesh) -> None:
    """Give a cut copy this rank's parts of the weights in FSDP's shards, tensor by tensor, rounded
    before they travel. Of a part FSDP gives each rank as many rows, but the last ones."""
    cut(model)
    group = None if mesh.fsdp is None else mesh.fsdp.get_group(mesh.fsdp.ndim - 1)
    shards = weights(model)
    for name, parameter in weights(copy).items():
        part = local_part(parameter)
        shard = local_part(shards[name].detach()).to(part.dtype)
        if group is not None:
            missing = -(-part.shape[0] // group.size()) - shard.shape[0]
            shard = nn.functional.pad(shard, (0, 0) * (shard.ndim - 1) + (0, missing))
            shard = all_gather(shard, group)[: part.shape[0]]
        part.copy_(shard)


def size(model: nn.Module) -> int:
    """Ranks, this one among them and each the next one's neighbour, that read a model which is cut
    by tensor together; 1 of any other."""
    group = _group(model)
    return 1 if group is None else group.size()


def least(model: nn.Module, value: int) -> int:
    """The least of what the ranks that read `model` together give."""
    group = _group(model)
    if group is None:
        return value
    device = next(model.parameters()).device
    found = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return int(found)


def first(
    model: nn.Module, tokens: np.ndarray, logprobs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """int64 and fp32 [B], as the first of the ranks that read `model` together has them."""
    group = _group(model)
    if group is None or not len(tokens):
        return tokens, logprobs
    # float64 holds either exactly.
    both = torch.from_numpy(np.stack((tokens, logprobs)).astype(np.float64))
    both = both.to(next(model.parameters()).device)
    dist.broadcast(both, group=group, group_src=0)
    chosen, drawn = both.cpu().numpy()
    return chosen.astype(tokens.dtype), drawn.astype(logprobs.dtype)


def _group(model: Any) -> dist.ProcessGroup | None:
    """Of the tensor ranks of a model that is read together, which FSDP does not hold."""
    norm = getattr(getattr(model, "transformer", None), "norm", None)
    devices = getattr(norm, "devices", None)
    return None if devices is None else devices.get_group()
