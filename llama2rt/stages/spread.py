"""What a stage trains, spread over the processes there are: in one process a plain model on its
device; among several ranks each reads from the folder, or draws, its own parts alone, and no rank
ever holds a whole model for it. And what it only reads or samples from, where that is spread too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from llama2rt.checkpoint.load import load_sharded
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.parallel import Mesh, ParallelOptions, tensor_group, world
from llama2rt.parallel.mesh import check as check_degrees
from llama2rt.parallel.options import DIMENSIONS
from llama2rt.parallel.parallelize import parallelize
from llama2rt.rollout.frozen import share
from llama2rt.stages.loading import default_device
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions

Model = TypeVar("Model", Llama, ScalarModel)


def check(
    parallel: ParallelOptions,
    config: LlamaConfig,
    train: TrainOptions,
    lora: LoraOptions | None = None,
    *,
    pipelined: bool = False,
) -> None:
    """InputError naming the key where a model of this shape cannot be trained as a recipe says,
    whatever the number of processes that `parallel` leaves open. `pipelined`: whether the stage can
    be a pipeline."""
    degrees = {name: getattr(parallel, name) or 1 for name in DIMENSIONS}
    adapted = lora is not None and lora.rank is not None
    check_degrees(degrees, config, pipelined=pipelined, adapted=adapted)
    train.check(max(parallel.least_ranks, world().size), world().device.type)


def from_folder(
    build: Callable[[torch.device | str], Model], folder: Path, mesh: Mesh, options: TrainOptions
) -> Model:
    """A model to train with the weights in `folder`. `build(device)`: it in one piece, as the stage
    wants it, with what it has besides (an adapter, a new head); on "meta" what is in the folder has
    no values yet, and all else has. InputError as from `build`."""
    if mesh.devices is None:
        model = build(default_device())
        parallelize(model, mesh, options.dtype, compile_blocks=options.compile)
        return model
    model = build("meta")
    parallelize(model, mesh, options.dtype, compile_blocks=options.compile)
    load_sharded(folder, model, default_device())
    return model


def to_read(
    build: Callable[[torch.device | str], Model], folder: Path, mesh: Mesh, dtype: torch.dtype
) -> Model:
    """A frozen model with the weights in `folder`, in `dtype`, which all ranks of `mesh` read
    together: cut as what is trained is, with weights gathered for a block's turn and no optimizer.
    `build` as of `from_folder`."""
    if mesh.devices is None:
        return build(default_device()).requires_grad_(False)
    model = build("meta").requires_grad_(False)
    parallelize(model, mesh, dtype)
    load_sharded(folder, model, default_device())
    return share(model, mesh)


def to_sample(build: Callable[[torch.device | str], Llama], folder: Path, mesh: Mesh) -> Llama:
    """A language model with the weights in `folder` to sample from: whole on every rank, or cut
    over the tensor ranks of `mesh`. `build` as of `from_folder`."""
    if mesh.degrees["tensor"] == 1:
        return build(default_device())
    model = build("meta")
    tensor_group.load(model, folder, mesh, default_device())
    return model


def from_seed(
    kind: type[Model], config: LlamaConfig, seed: int, mesh: Mesh, options: TrainOptions
) -> Model:
    """A model to train with the random weights that `kind.initialize(seed)` gives it."""
    model = kind(config, default_device() if mesh.devices is None else "meta", torch.float32)
    if mesh.devices is None:
        model.initialize(seed)
    parallelize(model, mesh, options.dtype, compile_blocks=options.compile)
    if mesh.devices is not None:
        # Here, because torch.distributed.checkpoint takes a second to import.
        from llama2rt.parallel.initialize import initialize

        initialize(model, seed, default_device())
    return model
