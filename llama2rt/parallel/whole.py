"""Whole weights of a model that lies in shards: once for a rollout phase, or to be saved.

FSDP gathers each block's weights anew for every forward pass. Training makes a few of those a step;
sampling makes one a token, and Llama 2's came out some 20 times slower for it, whatever the batch.
The remedy is the paper's (section 3.2.3): gather all weights once before generation, free them
after. Every rank then has a plain model and samples, scores and measures on its own. What is
gathered must fit one process beside its shards, or `whole` refuses; 70B parameters in bf16 are 138
GB, which ranks of one machine hold together (`parallel.tensor_group`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from llama2rt.checkpoint.files import weights
from llama2rt.errors import InputError
from llama2rt.memory import free_bytes
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.adapters import adapt_like
from llama2rt.parallel.shards import cut, is_dtensor, whole_tensor
from llama2rt.parallel.world import gather, world

Model = TypeVar("Model", Llama, ScalarModel)


@contextmanager
def whole(model: Model, dtype: torch.dtype | None = None) -> Iterator[Model]:
    """A plain frozen copy of a model that lies in shards, in `dtype` (None: as it is) on every
    rank's device, gone when the block ends; called by all ranks. A model that lies in one piece is
    itself the copy, whatever `dtype`: what computes with it keeps it in the compute dtype.

    InputError, on all ranks and before anything is gathered, where the copy is larger than what one
    of them has free.
    """
    if not in_shards(model):
        yield model
        return
    require_room(model, dtype)
    kind: type[Model] = Llama if isinstance(model, Llama) else ScalarModel
    with torch.device("meta"):
        plain = kind(model.config)
        adapt_like(plain, model)
    for name, tensor in whole_tensors(model, dtype):
        owner, _, attribute = name.rpartition(".")
        weight = nn.Parameter(tensor, requires_grad=False)
        setattr(plain.get_submodule(owner), attribute, weight)
    if isinstance(plain, ScalarModel) and isinstance(model, ScalarModel):
        plain.normalization, plain.unread = model.normalization, model.unread
    if isinstance(plain, Llama) and plain.config.tied:
        plain.output.weight = plain.transformer.embedding.weight
    plain.train(model.training)
    try:
        yield plain
    finally:
        # Whoever still holds the model, such as an engine, holds no memory by it.
        for parameter in plain.parameters():
            parameter.data = parameter.data.new_empty(0)


def in_shards(model: nn.Module) -> bool:
    """Whether ranks share the model's parameters."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def whole_tensors(
    model: Llama | ScalarModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each of `checkpoint.files.weights`, gathered one by one as they are
    asked for, rounded to `dtype` before they travel. All ranks must go through all of them."""
    cut(model)
    for name, parameter in weights(model).items():
        tensor = parameter.detach()
        if dtype is not None:
            tensor = tensor.to(dtype)
        yield name, whole_tensor(tensor)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, or its optimizer's master, the values of a whole tensor that every rank
    holds; each keeps its part."""
    if is_dtensor(parameter):
        # Here, because it takes a second to import.
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        value = DTensor.from_local(
            value.to(parameter.device, parameter.dtype), mesh, [Replicate()] * mesh.ndim
        ).redistribute(placements=parameter.placements)
    parameter.copy_(value)


def require_room(model: nn.Module, dtype: torch.dtype | None, ranks: int = 1) -> None:
    """InputError, on all ranks, where one of them has less memory free than what it is to hold of
    the model, which `ranks` share evenly."""
    parameters = list(model.parameters())
    needed = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters) / ranks
    least = min(gather(free_bytes(parameters[0].device)))
    if needed > least:
        part = "whole model" if ranks == 1 else f"part of the model that is one of {ranks}"
        raise InputError(
            f"parallel: the {part}, which sampling gathers on each of {world().size} "
            f"processes, takes {needed / 1e9:.1f} GB, and one of them has {least / 1e9:.1f} GB "
            "free; sample with a smaller model, or give each process more memory"
        )
