"""A model spread over the processes of a mesh, in place, each technique on top of those before it.

What a model is called with, and what it returns, stays as it is: a rank gives the whole packed
micro-batch that its tensor and context neighbours give too, and has whole outputs. Activation
checkpointing stands between compilation and sharding where blocks are called (`train.recompute`).

Left out: gradients that wait. Every micro-batch's are reduced, over replicas too, so that none is
ever held whole; with many micro-batches a step, larger ones (`train.micro_tokens`) send less.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel.context import split_micro_batches
from llama2rt.parallel.mesh import Mesh
from llama2rt.parallel.pipeline import Elsewhere, cut_layers
from llama2rt.parallel.shards import cut


def parallelize(
    model: Llama | ScalarModel,
    mesh: Mesh,
    dtype: torch.dtype = torch.float32,
    *,
    compile_blocks: bool = False,
) -> None:
    """Spread a model whose weights every rank holds whole, or, on the meta device, none.

    `dtype`: of activations and of the weights as the model sees them. Among several processes the
    parameters are fp32 shards from here on, whatever `dtype` is: they are the masters
    (`train.precision`). In one process nothing but compilation happens.
    """
    if mesh.degrees["pipeline"] > 1:
        cut_layers(model, mesh, dtype)
    if mesh.degrees["tensor"] > 1:
        # Here, because DTensors take a second to import.
        from llama2rt.parallel.tensor import tensor_parallel

        tensor_parallel(model, mesh)
    if mesh.degrees["tensor"] * mesh.degrees["context"] > 1:
        split_micro_batches(model, mesh)
    if compile_blocks:
        for block in own_blocks(model):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
    if mesh.devices is not None:
        shard(model, mesh, dtype)


def shard(model: Llama | ScalarModel, mesh: Mesh, dtype: torch.dtype) -> None:
    """FSDP2: each block's parameters are gathered for its turn and cut again after it; those around
    the blocks belong to the root, which keeps them between forward and backward.

    A mesh without a degree to shard over still gives its parameters to FSDP, for one owner of
    precision.
    """
    # Here, because FSDP2 takes seconds to import.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as also_called

    devices = mesh.fsdp if mesh.fsdp is not None else mesh.devices["shard"]  # type: ignore[index]
    for parameter in model.parameters():
        if parameter.requires_grad:  # a master; what an adapter leaves alone stays as it is
            parameter.data = parameter.data.to(torch.float32)
    # Inputs are ids, and blocks pass on what has the dtype already.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    communication = _communication(devices)
    for module in (*own_blocks(model), model):
        fully_shard(module, mesh=devices, mp_policy=policy)
        if communication is not None:
            module.set_custom_all_gather(communication[0])
            module.set_custom_reduce_scatter(communication[1])
            # Nothing is fetched while something else is computed: of itself, which is there, and
            # not of the block before, which would take memory for nothing.
            module.set_modules_to_backward_prefetch([module])
        # Losses are divided by what all ranks predict together; gloo has no mean.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    also_called(model, "hidden")
    _cut_after_inference(model)


def _communication(devices: DeviceMesh) -> tuple[Any, Any] | None:
    """(all-gather, reduce-scatter) of ranks that share memory; None: torch's own."""
    group = devices.get_group(devices.ndim - 1)  # before it are replicas
    if devices.device_type != "cpu" or group.size() == 1:
        return None
    # Here, because FSDP2 takes seconds to import.
    from llama2rt.parallel import shared_memory

    shared = shared_memory.segments(group)
    if shared is None:
        return None
    return shared_memory.SharedAllGather(shared), shared_memory.SharedReduceScatter(shared)


def own_blocks(model: Llama | ScalarModel) -> list[Any]:
    """Those that no other stage of a pipeline has."""
    blocks: Any = model.transformer.blocks
    return [block for block in blocks if not isinstance(block, Elsewhere)]


def _cut_after_inference(model: nn.Module) -> None:
    """After a forward pass without gradients no backward pass cuts the root's parameters again.

    Whole, they would go stale with the next optimizer step, and whoever lists parameters would see
    other tensors than the optimizer's.
    """

    def finish(*_: Any) -> None:
        if not torch.is_grad_enabled():
            cut(model)

    hidden: Any = model.hidden

    @functools.wraps(hidden)
    def hidden_then_cut(*batch: Any, **options: Any) -> Any:
        result = hidden(*batch, **options)
        finish()
        return result

    model.register_forward_hook(finish)
    model.hidden = hidden_then_cut  # type: ignore[assignment]
