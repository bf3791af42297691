"""More than one process: who they are, and how a model and its batches are spread over them."""

from llama2rt.parallel.mesh import Mesh
from llama2rt.parallel.options import ParallelOptions
from llama2rt.parallel.world import (
    World,
    barrier,
    broadcast,
    by_main,
    gather,
    is_main,
    on_main,
    world,
)

__all__ = [
    "Mesh",
    "ParallelOptions",
    "World",
    "barrier",
    "broadcast",
    "by_main",
    "gather",
    "is_main",
    "on_main",
    "world",
]
