"""The processes that torchrun started, as everything else sees them: how many, which one this is,
and the few things they say to each other besides tensors. One process alone is a world of one, in
which all of this costs nothing.

Files, metrics and messages belong to rank 0 (`is_main`). What only rank 0 does, such as opening a
run directory, goes through `on_main`, so that its outcome, or its error, is every rank's. While it
does so it is a world of one: code for one process works there as it stands.
"""

import datetime
import functools
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llama2rt.errors import InputError
from llama2rt.parallel import faults

Result = TypeVar("Result")
Given = ParamSpec("Given")

# While rank 0 tokenises a corpus the others wait for its word.
PATIENCE = datetime.timedelta(days=2)


@dataclass(frozen=True)
class World:
    """All processes of this job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """on this machine: the index of its GPU"""

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


# Whether rank 0 is inside `on_main`.
_alone = False
# Caches of what `until_stop` has wrapped.
_caches: list[Any] = []


def world() -> World:
    """This process among those that `start` has joined; a world of one without, and inside
    `on_main`."""
    if _alone or not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def start() -> World:
    """Join the processes that torchrun started, if it started several; once a process.

    gloo for what lies on CPUs, NCCL for what lies on GPUs. InputError where the environment says
    that there are several and not how to meet them.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return world()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start "
            "several processes by torchrun"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store when it starts the ranks anew, and with it the addresses of dead ones
    # (seen with torch 2.13: a new rank that asks before the other has written meets nobody).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}-of-{size}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    here = world()
    faults.begin(faults.Group(store, here.rank, here.size, here.device, _control()))
    faults.set_limit(faults.LIMIT)
    return here


def stop() -> None:
    """Leave the processes that `start` joined."""
    faults.end()
    for cache in _caches:
        cache.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def until_stop(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function` with its results kept until `stop`: for process groups, which all ranks make
    together, once, and which outlive the job where anything keeps them."""
    kept: Any = functools.cache(function)
    _caches.append(kept)
    return cast(Callable[Given, Result], kept)


def is_main() -> bool:
    """Whether this process writes the files and says the messages: rank 0."""
    return world().rank == 0


def barrier() -> None:
    """Wait until every rank is here, as long as it takes."""
    if world().size > 1:
        dist.monitored_barrier(_control(), timeout=PATIENCE)
        faults.met()


def broadcast(value: Result) -> Result:
    """Rank 0's `value` (what pickle can carry) on every rank."""
    if world().size == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, group=_control(), device=torch.device("cpu"))
    return values[0]


def gather(value: Result) -> list[Result]:
    """Every rank's `value` (what pickle can carry), by rank, on every rank."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value, group=_control())
    faults.met()
    return values


def on_main(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, which alone calls it, as if there were no other; what it
    raises there is raised on every rank, marked `everywhere`, for whoever prints it to do so once.
    Both travel by pickle."""
    global _alone
    if world().size == 1:
        return function()
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        _alone = True
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, portable(error)
        finally:
            _alone = False
    result, failed = broadcast(outcome)
    if failed is not None:
        raise failed
    return result


def by_main(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function` as one that every rank calls and rank 0 alone carries out (`on_main`)."""

    @functools.wraps(function)
    def called_everywhere(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return on_main(functools.partial(function, *args, **kwargs))

    return called_everywhere


def portable(error: Exception) -> Exception:
    """`error` marked as everyone's, or what can be said of it where pickle cannot carry it: the
    other ranks wait for it, and must not wait in vain."""
    error.everywhere = True  # type: ignore[attr-defined]
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.everywhere = True  # type: ignore[attr-defined]
        return told.with_traceback(error.__traceback__)
    return error


@until_stop
def _control() -> dist.ProcessGroup:
    """All ranks, for objects on the CPU: with the patience that tensors do not get."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
