"""What ranks do in tests/parallel/test_shared_memory.py."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from parallel_models import SHAPE, micro_batch
from torch import Tensor
from torch.distributed import ReduceOp

from llama2rt.model import Llama, LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions, shared_memory, world
from llama2rt.parallel.collectives import all_gather, reduce_scatter
from llama2rt.parallel.parallelize import parallelize

PIECE = 1 << 10


def _numbers(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * count + world().rank)
    return torch.randn(count, generator=generator).to(dtype)


def compare_with_gloo(counts: list[int]) -> dict[str, bool]:
    """Whether every all-gather and reduce-scatter, of `counts` elements a rank and one after the
    other through the same pieces, gives what gloo gives."""
    group, same = dist.group.WORLD, {}
    size = world().size
    shared_memory.segments.cache_clear()
    with mock.patch.object(shared_memory, "PIECE_BYTES", PIECE):
        segments = shared_memory.segments(group)
        gather = shared_memory.SharedAllGather(segments)
        scatter = shared_memory.SharedReduceScatter(segments)
        for count in counts:
            for dtype in (torch.float32, torch.bfloat16):
                own = _numbers(count, dtype)
                apart = gather.allocate((size * count,), dtype=dtype, device=own.device)
                gather(apart, own, group)
                inside = torch.empty_like(apart)
                row = inside.view(size, -1)[world().rank].copy_(own)
                gather(inside, row, group)
                expected = all_gather(own, group)
                same[f"gather {count} {dtype}"] = expected.equal(apart) and expected.equal(inside)
            # Whole numbers: their sum is the same in any order.
            terms = _numbers(size * count, torch.float32).mul(100).round()
            out = torch.empty(count)
            scatter(out, terms, group, ReduceOp.SUM)
            same[f"scatter {count}"] = reduce_scatter(terms, group).equal(out)
    shared_memory.segments.cache_clear()
    return same


def where_memory_is_not_shared() -> list[Any]:
    """What there is for ranks on two machines, and for some that may not open each other's."""
    found = []
    other_machine = mock.Mock(return_value=(f"machine {world().rank}", 0))
    refused = mock.Mock(side_effect=PermissionError)
    opened = shared_memory._opened if world().rank else refused
    for name, stand_in in (("_machine", other_machine), ("_opened", opened)):
        shared_memory.segments.cache_clear()
        with mock.patch.object(shared_memory, name, stand_in):
            found.append(shared_memory.segments(dist.group.WORLD))
    shared_memory.segments.cache_clear()
    return found


def gradients(options: ParallelOptions, shared: bool) -> tuple[list[Tensor], list[str]]:
    """(this rank's gradients of one step, names of the collectives' classes) of a model that is
    sharded with or without shared memory."""
    config = LlamaConfig(**SHAPE, context=64)
    mesh = Mesh.build(options, config)
    with mock.patch.object(shared_memory, "PIECE_BYTES", PIECE):
        shared_memory.segments.cache_clear()
        model = Llama(config).initialize(0)
        if not shared:
            stand_in = mock.Mock(return_value=None)
            with mock.patch.object(shared_memory, "segments", stand_in):
                parallelize(model, mesh)
        else:
            parallelize(model, mesh)
        *inputs, targets = micro_batch([9, 17], seed=mesh.batch_rank)
        (-model(*inputs, targets).sum()).backward()
    shared_memory.segments.cache_clear()
    found = [parameter.grad.to_local() for parameter in model.parameters()]
    group = model.transformer.blocks[0]._get_fsdp_state()._fsdp_param_group
    classes = [type(c).__name__ for c in (group._all_gather_comm, group._reduce_scatter_comm)]
    return found, classes
