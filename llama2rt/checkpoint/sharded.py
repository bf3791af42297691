"""Each rank's parts of tensors: of checkpoints that a group has written, and of model folders.

A checkpoint's parts lie in safetensors files whose header says of each which tensor it belongs to
and where it begins there (`CHUNKS`); a file without that entry holds whole tensors, as one process
writes them. torch.distributed.checkpoint plans which part of which file fills which part of a
DTensor.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from llama2rt.checkpoint.files import DTYPES
from llama2rt.checkpoint.weight import Area, Weight
from llama2rt.model import Llama

CHUNKS = "chunks"
"""key in a file's header: JSON {name: [shape of the whole tensor, where this part begins]}"""
RANKS_OWN = "generator."
"""tensors of such a name are each rank's own: rank 3's is stored as `generator.torch@3`"""

# What a checkpoint holds besides weights: counts, generators. All else is read to find out.
_DTYPES = {**DTYPES, "I64": torch.int64, "U8": torch.uint8}


def stored_by(name: str, rank: int) -> str:
    """What `rank` calls its tensor `name` in a file."""
    return f"{name}@{rank}" if name.startswith(RANKS_OWN) and rank else name


class Parts:
    """The tensors in some files of a folder. OSError, ValueError or SafetensorError where a file
    cannot be read."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self._folder = folder
        self._file_of: dict[MetadataIndex, str] = {}
        tensors: dict[str, TensorStorageMetadata] = {}
        for file in files:
            with safe_open(folder / file, framework="pt") as opened:
                chunks = json.loads((opened.metadata() or {}).get(CHUNKS, "{}"))
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    here = torch.Size(part.get_shape())
                    shape, begin = chunks.get(name, (here, [0] * len(here)))
                    dtype = _DTYPES.get(part.get_dtype()) or opened.get_tensor(name).dtype
                    whole = tensors.setdefault(
                        name,
                        TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), []),
                    )
                    whole.chunks.append(ChunkStorageMetadata(torch.Size(begin), here))
                    self._file_of[MetadataIndex(name, begin)] = file
        self.tensors = tensors

    def mismatch(self, into: Mapping[str, Tensor], rank: int = 0) -> str | None:
        """What is wrong where a tensor of `into` has another shape than the stored one."""
        for name, tensor in into.items():
            found = self._find(name, rank)
            if found is not None and self.tensors[found].size != tensor.shape:
                shape = list(self.tensors[found].size)
                return f"{name}: expected shape {list(tensor.shape)}, got {shape}"
        return None

    def read(self, into: Mapping[str, Tensor], rank: int = 0) -> dict[str, Tensor]:
        """Fill those tensors of `into` that are stored, each with what of it lies on this rank, and
        return them. Where the generator of `rank` is not there, it takes rank 0's."""
        names = {name: found for name in into if (found := self._find(name, rank)) is not None}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        # Under the names in the files, as a rank's generator has another name there.
        targets = {found: into[name].detach() for name, found in names.items()}
        planner.set_up_planner(targets, Metadata(dict(self.tensors)), is_coordinator=True)
        items: dict[str, list] = {}
        for item in planner.create_local_plan().items:
            items.setdefault(self._file_of[item.storage_index], []).append(item)
        for file in sorted(items):
            with safe_open(self._folder / file, framework="pt") as opened:
                for item in items[file]:
                    name = item.storage_index.fqn
                    area = _area(item)
                    part = opened.get_slice(name)[area] if area else opened.get_tensor(name)
                    planner.resolve_tensor(item).detach().copy_(part)
        return {name: into[name] for name in names}

    def whole(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors in full, on the CPU: of one rank's generators, rank 0's. None: all of them."""
        if names is None:
            names = self.names
        empty = {
            name: torch.empty(
                self.tensors[name].size, dtype=self.tensors[name].properties.dtype, device="cpu"
            )
            for name in names
        }
        return self.read(empty)

    @property
    def names(self) -> list[str]:
        """Of the tensors, without the generators of ranks other than 0."""
        return [name for name in self.tensors if not (name.startswith(RANKS_OWN) and "@" in name)]

    def _find(self, name: str, rank: int) -> str | None:
        for stored in (stored_by(name, rank), name):
            if stored in self.tensors:
                return stored
        return None


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a model on the meta device, cut up or not, memory on `device`; of no particular values.
    One that has memory already keeps it."""
    parameters = list(model.parameters())
    if not any(parameter.is_meta for parameter in parameters):
        return
    model.to_empty(device=device)
    if isinstance(model, Llama) and model.config.tied:
        model.output.weight = model.transformer.embedding.weight


@torch.no_grad()
def place(parameter: Tensor, weight: Weight) -> None:
    """Read what of a weight lies on this rank into its parameter, which keeps its dtype."""
    properties = TensorProperties(weight.dtype)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(weight.shape)), weight.shape)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    stored = TensorStorageMetadata(properties, weight.shape, [chunk])
    planner.set_up_planner({"": parameter.detach()}, Metadata({"": stored}), is_coordinator=True)
    for item in planner.create_local_plan().items:
        planner.resolve_tensor(item).detach().copy_(weight.read(_area(item)))


def _area(item: ReadItem) -> Area:
    """What of a stored part a planned read takes."""
    return tuple(
        slice(begin, begin + length)
        for begin, length in zip(item.storage_offsets, item.lengths, strict=True)
    )
