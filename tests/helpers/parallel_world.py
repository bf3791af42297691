"""What ranks do in tests/parallel/test_world.py and test_mesh.py."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama2rt.errors import InputError
from llama2rt.model import LlamaConfig
from llama2rt.parallel import Mesh, ParallelOptions, barrier, broadcast, gather, on_main, world

CONFIG = LlamaConfig(
    dim=32, layers=2, heads=4, kv_heads=2, ffn_hidden=64, vocab_size=64, context=32
)


def talk(folder: Path) -> dict[str, Any]:
    here = world()

    def once() -> str:
        (folder / f"by-{world().rank}").touch()
        return "done"

    def wrong() -> None:
        raise InputError("recipe.toml: no")

    said = broadcast(f"rank {here.rank}")
    result = {"said": said, "all": gather(here.rank), "did": on_main(once)}
    barrier()
    try:
        on_main(wrong)
    except InputError as error:
        result["error"] = (str(error), getattr(error, "everywhere", False))
    return result


def layout(options: ParallelOptions) -> dict[str, Any]:
    mesh = Mesh.build(options, CONFIG)
    groups = {
        name: sorted(dist.get_process_group_ranks(group))
        for name in mesh.degrees
        if (group := mesh.group(name)) is not None
    }
    fsdp = None if mesh.fsdp is None else mesh.fsdp.mesh.tolist()
    return {
        "degrees": mesh.degrees,
        "batch": (mesh.batch_rank, mesh.batch_ranks),
        "groups": groups,
        "fsdp": fsdp,
    }


def fail_on_one() -> None:
    if world().rank == 1:
        raise ValueError("only rank 1")
    barrier()


def groups_after(*each: ParallelOptions) -> list[int]:
    """How many process groups there are after a mesh of each of these has been built."""
    counts = []
    for options in each:
        Mesh.build(options, CONFIG)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts
