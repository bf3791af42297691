"""What ranks do in tests/parallel/test_group_checkpoints.py."""

import resource
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from llama2rt.checkpoint import store
from llama2rt.checkpoint.store import CheckpointError
from llama2rt.parallel import barrier, world
from llama2rt.parallel.checkpoint import open_store
from llama2rt.parallel.group_store import GroupStore

STATE = {"loader": {"epoch": 1}, "loss": 0.1 + 0.2, "nested": [1, 2.5, None]}
# Layout -> (shape of the mesh, a placement along each of its dimensions).
LAYOUTS: dict[str, tuple[tuple[int, ...], list]] = {
    "2": ((2,), [Shard(0)]),
    "4": ((4,), [Shard(0)]),
    "rows x columns": ((2, 2), [Shard(0), Shard(1)]),
    "replicas": ((2, 2), [Replicate(), Shard(0)]),
}


def whole(seed: int) -> dict[str, Tensor]:
    """The tensors of step `seed`, uneven and empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "master.a": torch.randn(33, 8, generator=generator),
        "master.half": torch.randn(5, 6, generator=generator).bfloat16(),
        "master.three": torch.randn(3, 2, generator=generator),
        "empty": torch.zeros(0, 3),
        "step.a": torch.tensor(float(seed)),
    }


def spread(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same as DTensors (scalars stay plain), and this rank's generator."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    parts = {
        name: distribute_tensor(tensor, mesh, placements) if tensor.ndim > 1 else tensor.clone()
        for name, tensor in tensors.items()
    }
    return parts | {"generator.torch": generator(world().rank)}


def generator(rank: int) -> Tensor:
    return torch.Generator().manual_seed(rank).get_state()


def save(folder: Path, layout: str, *steps: int) -> list[int]:
    kept = open_store(folder)
    for step in steps:
        kept.save(step, spread(whole(step), layout), STATE | {"rank": world().rank})
    kept.wait()
    return kept.steps()


def read(folder: Path, layout: str) -> dict[str, Any]:
    """What this rank finds: every value put together, its own generator and state."""
    into = spread({name: torch.full_like(t, -1) for name, t in whole(0).items()}, layout)
    into["generator.torch"] = generator(100)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = open_store(folder).latest(into)
    assert found is not None
    step, tensors, state = found
    own = tensors.pop("generator.torch")
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    expected = whole(step)
    assert full.keys() == expected.keys()
    for name, tensor in expected.items():
        assert full[name].dtype == tensor.dtype, name
        assert torch.equal(full[name], tensor), name
        assert tensors[name] is into[name]
    return {
        "step": step,
        "rank": state.pop("rank", None),
        "same": state == STATE,
        "generator": [rank for rank in range(4) if torch.equal(own, generator(rank))],
        "warnings": [str(warning.message) for warning in said],
    }


def sharded_linear() -> dict[str, Tensor]:
    """Weights of a layer under tensor parallelism and FSDP2: torch's strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    torch.manual_seed(5)
    layer = nn.Sequential(nn.Linear(8, 24, bias=False))
    parallelize_module(layer, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(layer, mesh=mesh["shard"])
    return dict(layer.named_parameters())


def save_sharded_linear(folder: Path) -> str:
    weights = sharded_linear()
    kept = GroupStore(folder)
    kept.save(1, weights, {})
    kept.wait()
    return str(weights["0.weight"].placements)


def read_sharded_linear(folder: Path) -> bool:
    expected = sharded_linear()
    into = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    found = GroupStore(folder).latest(into)
    assert found is not None
    return all(torch.equal(found[1][n].to_local(), expected[n].to_local()) for n in expected)


def training_goes_on(folder: Path) -> dict[str, Any]:
    """A step changes the tensors while their files are not written yet."""
    kept = GroupStore(folder)
    tensors = spread(whole(1), "4")
    describe, step_taken = store.described, threading.Event()

    def after_the_step(path: Path) -> dict[str, Any]:
        assert step_taken.wait(60)
        return describe(path)

    store.described = after_the_step
    try:
        kept.save(1, tensors, STATE)
        for tensor in tensors.values():
            tensor.zero_()
        kept.check()
        before = kept.steps()
        step_taken.set()
        kept.wait()
    finally:
        store.described = describe
    return {"before": before, "after": kept.steps(), "found": read(folder, "4")["step"]}


def full_disk(folder: Path, how: str) -> dict[str, Any]:
    """Rank 1 cannot write step 20."""
    save(folder, "2", 10)
    kept = GroupStore(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = ""
    big = {"big": distribute_tensor(torch.zeros(1000, 100), *_ends("2"))}
    barrier()
    if world().rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        kept.save(20, big, {})
        if how == "wait":
            kept.wait()
        elif how == "save":
            kept.save(30, big, {})
        for _ in range(2000):
            kept.check()
            time.sleep(0.01)
    except CheckpointError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    barrier()
    names = sorted(path.name for path in folder.iterdir())
    return {"said": said, "left": names, "found": read(folder, "2")["step"]}


def unwritable(folder: Path) -> str:
    """Rank 0 cannot make the folder."""
    kept = GroupStore(folder / "file" / "checkpoints")
    kept.save(1, spread(whole(1), "2"), STATE)
    try:
        kept.wait()
    except CheckpointError as error:
        return str(error)
    return ""


def all_damaged(folder: Path) -> str:
    try:
        read(folder, "2")
    except CheckpointError as error:
        return str(error)
    return ""


def other_names(folder: Path) -> dict[str, Any]:
    """Tensors that nobody asks for, ones that are not there, and one of another shape."""
    into = spread({"master.a": torch.zeros(33, 8), "new": torch.zeros(4, 2)}, "2")
    found = GroupStore(folder).latest(into)
    assert found is not None
    try:
        GroupStore(folder).latest(spread({"master.a": torch.zeros(8, 33)}, "2"))
        said = ""
    except CheckpointError as error:
        said = str(error)
    kinds = {name: type(tensor).__name__ for name, tensor in found[1].items()}
    return {"kinds": kinds, "said": said}


def _ends(layout: str) -> tuple[Any, list]:
    shape, placements = LAYOUTS[layout]
    return init_device_mesh("cpu", shape), placements
