"""Checkpoints of a group of ranks: each writes what it holds, and any number of ranks reads it.

The folders are those of `checkpoint.store`: complete or invisible, every file with its SHA-256 in
an index. torch.distributed.checkpoint decides who writes what several ranks hold alike, and carries
an error of one rank to all. A checkpoint is written in the background: `save` copies this rank's
parts to the CPU and returns. All ranks must see the same file system.
"""

import dataclasses
import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageWriter,
)
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from llama2rt import atomic
from llama2rt.checkpoint import store
from llama2rt.checkpoint.sharded import CHUNKS, Parts, stored_by
from llama2rt.checkpoint.store import CheckpointError, Store
from llama2rt.parallel.world import (
    PATIENCE,
    broadcast,
    gather,
    is_main,
    on_main,
    until_stop,
    world,
)


class GroupStore(Store):
    """The checkpoints of a run of several ranks, which all call its methods in the same order."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        super().__init__(directory, keep)
        self._writing: _Writing | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Begin to write `step-{step}`; it appears when every rank's part is on the disk.

        `tensors`: DTensors, of which this rank's parts are written, and tensors that are the same
        on every rank that has them; those named `generator.` are each rank's own. `state`: what
        json can hold; where a rank's differs from rank 0's, each keeps its own.

        Returns when the parts are copied to the CPU, which takes as much memory there until they
        are written. What goes wrong then is raised by the next `check`, `wait`, `save` or `latest`:
        the same CheckpointError on every rank, with every earlier checkpoint still there.
        """
        self.wait()
        rank = world().rank
        named = {stored_by(name, rank): tensor for name, tensor in tensors.items()}
        plan = create_default_local_save_plan(named, is_main())
        # A rank that holds nothing of a tensor, as there are more ranks than rows, writes nothing.
        items = [item for item in plan.items if 0 not in _chunk(item) or 0 in _size(item)]
        plan = SavePlan(items, storage_data=json.dumps(state))
        copies = {name: _copy(tensor) for name, tensor in named.items()}
        writer = _Writer(self, step)

        group = _background()

        def write() -> None:
            try:
                dcp.save(copies, storage_writer=writer, planner=_Planner(plan), process_group=group)
            except BaseException:
                writer.abandon()
                raise

        self._writing = _Writing(step, write)
        return self.path(step)

    def check(self) -> None:
        """To be called between two steps: raises what a write in the background has met, once it
        is over on every rank. Free while nothing is written."""
        if self._writing is not None and all(gather(self._writing.over)):
            self.wait()

    def wait(self) -> None:
        """Return, or raise CheckpointError, once nothing is written any more."""
        writing, self._writing = self._writing, None
        if writing is not None and (reason := writing.join()) is not None:
            raise self.not_written(writing.step, reason)

    def latest(
        self, into: Mapping[str, Tensor] | None = None
    ) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """As of `Store`, with the same outcome on every rank; each checks a part of the files.

        The tensors of `into` are filled, each with what of it lies on this rank, and are what is
        returned; stored ones that no rank has in `into` come whole, on the CPU. CheckpointError
        where one has another shape than the stored one. A rank that was not there when the
        checkpoint was written has rank 0's generators and state.
        """
        self.wait()
        into = into or {}
        steps = on_main(self.steps)
        for step in reversed(steps):
            folder = self.path(step)
            index, reason = self._verified(folder)
            found = None
            if reason is None:
                found, reason = self._read(folder, index, into)
            if found is not None:
                ours = index.get("states", {}).get(str(world().rank), index["state"])
                return step, found, ours
            if is_main():
                store.warn_of_damage(folder, str(reason))
        if steps:
            raise self.all_damaged(steps)
        return None

    def _verified(self, folder: Path) -> tuple[dict[str, Any], str | None]:
        """(index, what is wrong with the checkpoint or None), the same on every rank."""
        index: dict[str, Any] | None = None
        reason = None
        if is_main():
            index, reason = _attempt(lambda: store.read_index(folder))
        index, reason = broadcast((index, reason))
        if index is None:
            return {}, reason
        here = world()
        for name in list(index["files"])[here.rank :: here.size]:
            if reason is None:
                check = functools.partial(store.check_file, folder / name, index["files"][name])
                _, reason = _attempt(check)
        return index, _first(gather(reason))

    def _read(
        self, folder: Path, index: dict[str, Any], into: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor] | None, str | None]:
        """(tensors or None, what is wrong with the checkpoint or None), the latter on all ranks."""
        parts, reason = _attempt(lambda: Parts(folder, index["files"]))
        if (failed := _first(gather(reason))) is not None or parts is None:
            return None, failed
        rank = world().rank
        mismatch = _first(gather(parts.mismatch(into, rank)))
        if mismatch is not None:
            raise CheckpointError(f"{folder}: {mismatch}")
        wanted = set().union(*gather(set(into)))
        others = [name for name in parts.names if name not in wanted]
        found, reason = _attempt(lambda: parts.read(into, rank) | parts.whole(others))
        failed = _first(gather(reason))
        return (found if failed is None else None), failed


class _Writing:
    """A checkpoint being written by a thread of its own."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        self.step = step
        self._write = write
        self._reason: str | None = None
        # A daemon: a process that is to end does not wait for ranks that may be dead.
        self._thread = threading.Thread(target=self._run, name=f"step-{step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except CheckpointException as failed:  # no Exception, in torch
            self._reason = "; ".join(
                f"rank {rank}: {error}" for rank, (error, _) in sorted(failed.failures.items())
            )
        except Exception as error:  # the connection to a rank that died
            self._reason = f"{type(error).__name__}: {error}"

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> str | None:
        """Wait for the end; why the checkpoint is not there, or None."""
        self._thread.join()
        return self._reason


class _Planner(DefaultSavePlanner):
    """torch's, but for parts that were copied when the plan was made."""

    def __init__(self, plan: SavePlan) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copied = plan

    def create_local_plan(self) -> SavePlan:
        self.plan = self._copied
        return self._copied

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


class _Writer(StorageWriter):
    """Where torch.distributed.checkpoint leaves the parts: rank 0 opens the folder before any rank
    writes, and gives it its index and name when every rank has written."""

    def __init__(self, kept: Store, step: int) -> None:
        self._store, self._step = kept, step
        # Of no process: a rank's successor of another number must find it and sweep it up.
        self._folder = kept.directory / f"tmp-{step}-group"
        self._states: list[str] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._store.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._store.directory.glob("tmp-*"):
            shutil.rmtree(leftover)
        self._folder.mkdir()
        self._states = [plan.storage_data for plan in plans]
        return [
            dataclasses.replace(plan, storage_data=f"tensors-{rank:05d}")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(_files(plan.items)):
            path = self._folder / f"{plan.storage_data}-{number:05d}.safetensors"
            tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in items}
            chunks = {
                item.index.fqn: [list(_size(item)), list(item.index.offset or ())] for item in items
            }
            try:
                save_file(tensors, path, {"format": "pt", CHUNKS: json.dumps(chunks)})
                about = store.described(path)
            except Exception as error:
                # As text: another rank may not be able to unpickle the error itself.
                raise OSError(str(error)) from None
            results.append(WriteResult(MetadataIndex(path.name), about["bytes"], about))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        first = self._states[0]
        files = {written.index.fqn: written.storage_data for rank in results for written in rank}
        index = {
            "step": self._step,
            store.RANKS: len(results),
            "files": files,
            "state": json.loads(first),
            "states": {
                str(rank): json.loads(own) for rank, own in enumerate(self._states) if own != first
            },
        }
        store.write_index(self._folder, index)
        final = self._store.path(self._step)
        if final.exists():
            shutil.rmtree(final)  # as in Store.save
        self._folder.rename(final)
        atomic.sync(self._store.directory)
        self._store.drop_all_but_newest(self._step)

    def abandon(self) -> None:
        """Remove what has been written, which would only fill the disk."""
        if is_main():
            shutil.rmtree(self._folder, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _copy(tensor: Tensor) -> Tensor:
    """This rank's part of it, on the CPU, which no step changes any more."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _size(item: WriteItem) -> torch.Size:
    """Shape of the whole tensor that a part belongs to."""
    assert item.tensor_data is not None
    return item.tensor_data.size


def _chunk(item: WriteItem) -> torch.Size:
    """Shape of the part."""
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes


def _bytes(item: WriteItem) -> int:
    """Of the part; torch's `tensor_storage_size` counts the whole tensor."""
    assert item.tensor_data is not None
    return _chunk(item).numel() * item.tensor_data.properties.dtype.itemsize


def _files(items: list[WriteItem]) -> list[list[WriteItem]]:
    """What a rank has to write, in files of at most SHARD_BYTES where parts are not larger."""
    files: list[list[WriteItem]] = []
    filled = 0
    for item in items:
        size = _bytes(item)
        if not files or filled + size > store.SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += size
    return files


def _attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what `read` returns, None), or (None, why the checkpoint is damaged)."""
    try:
        return read(), None
    except store.DAMAGE as error:
        return None, str(error) or type(error).__name__


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


@until_stop
def _background() -> dist.ProcessGroup:
    """All ranks, for what threads say to each other while the steps go on."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
