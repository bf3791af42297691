"""Weights that are read when they are needed, whole or in part: of a folder, or of a model.

Whoever writes, converts or fills a model takes one tensor at a time from here, so that a model
larger than the memory passes through; and whoever holds a shard reads the shard.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel

logger = logging.getLogger("llama2rt.checkpoint.weights")

LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OUTPUT, EMBEDDING = "output.weight", "transformer.embedding.weight"
"""parameters of a `Llama`, which a tied one shares"""

Area = tuple[slice, ...]
"""part of a tensor: a slice with both ends for each dimension"""


@dataclass(frozen=True)
class Weight:
    """A tensor that is somewhere: `read` fetches it."""

    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[Area], Tensor]
    """the part of it in an area, on any device; perhaps a view of a mapped file"""

    def read(self, area: Area | None = None) -> Tensor:
        """The tensor, or the part of it in `area`, on the CPU."""
        part = self.fetch(tuple(slice(0, n) for n in self.shape) if area is None else area)
        return part.detach().to("cpu", self.dtype)

    def rows(self, rows: int) -> Iterator[Tensor]:
        """The tensor in pieces of so many rows."""
        for begin in range(0, self.shape[0], rows):
            rest = tuple(slice(0, n) for n in self.shape[1:])
            yield self.read((slice(begin, min(begin + rows, self.shape[0])), *rest))

    def to(self, dtype: torch.dtype) -> "Weight":
        return dataclasses.replace(self, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def of_tensor(tensor: Tensor) -> Weight:
    """A weight in memory. One that ranks share is fetched by all of them together, whole."""

    def fetch(area: Area) -> Tensor:
        # A DTensor, without importing what that needs in one process.
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return whole.detach()[area]

    return Weight(tensor.shape, tensor.dtype, fetch)


def parameters(model: Llama | ScalarModel) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied output once, under the embedding's name (as in transformers)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if model.config.tied:
        named.pop(OUTPUT, None)
    return named


Stored = tuple[Path, str, Weight]
"""(file, name there, weight)"""


def match(
    model: Llama | ScalarModel,
    stored: Iterable[Stored],
    dtype: torch.dtype | None,
    stored_name: Callable[[str], str],
) -> dict[str, Weight]:
    """The weights of a model by parameter name, in the order and all in the dtype in which they
    are to be read; InputError for one missing, left over, of the wrong shape or of a dtype that is
    not floating point. `stored_name` turns a parameter's name into the one in the files.

    dtype None keeps the stored one; where the files mix several, all become the one that holds them
    all, and a warning says so. A tied model may come with its output under either name; where it
    comes with two that differ, both are kept and the model's configuration is no longer tied, with
    a warning.
    """
    wanted = parameters(model)
    tied = isinstance(model, Llama) and model.config.tied
    name_of = {stored_name(name): name for name in (*wanted, *([OUTPUT] if tied else []))}
    found: dict[str, Weight] = {}
    kinds: dict[torch.dtype, str] = {}
    path = None
    for path, shown, weight in stored:
        name = name_of.get(shown)
        if name is None:
            raise InputError(f"{path}: {shown}: not part of a model of this configuration")
        _check(f"{path}: {shown}", weight, wanted[EMBEDDING if tied and name == OUTPUT else name])
        kinds.setdefault(weight.dtype, shown)
        found[name] = weight
    if tied and OUTPUT in found and EMBEDDING not in found:
        found[EMBEDDING] = found.pop(OUTPUT)
    missing = sorted(stored_name(name) for name in wanted.keys() - found.keys())
    if missing:
        raise InputError(f"{path}: {missing[0]}: missing ({len(missing)} tensors in all)")
    if tied and OUTPUT in found:
        if _same_values(found[OUTPUT], found[EMBEDDING], dtype):
            del found[OUTPUT]
        else:
            logger.warning(
                "%s: the configuration ties the output to the embedding, but %s differs from it: "
                "both are kept, and the model is not tied",
                path,
                stored_name(OUTPUT),
            )
            model.config = model.transformer.config = dataclasses.replace(model.config, tied=False)
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, kinds)
        if len(kinds) > 1:
            logger.warning(
                "%s: %s; all become %s",
                path,
                ", ".join(f"{name} is {kind}" for kind, name in kinds.items()),
                dtype,
            )
    return {name: weight.to(dtype) for name, weight in found.items()}


def fill(
    model: Llama | ScalarModel, weights: Mapping[str, Weight], device: torch.device | str
) -> None:
    """Give a model built on the meta device its weights (`match`); on that device, only their
    dtype."""
    for name, weight in weights.items():
        if torch.device(device).type == "meta":
            tensor = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        else:
            # A copy: a mapped file that is truncated later must not take the process with it.
            tensor = weight.read().to(device, copy=True)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
    if isinstance(model, Llama) and model.config.tied:
        model.output.weight = model.transformer.embedding.weight


def _check(where: str, weight: Weight, like: Tensor) -> None:
    """InputError unless `weight` can become `like`."""
    if weight.shape != like.shape:
        raise InputError(f"{where}: expected shape {list(like.shape)}, got {list(weight.shape)}")
    if weight.dtype not in LOADABLE:
        names = (str(dtype).removeprefix("torch.") for dtype in (*LOADABLE, weight.dtype))
        *expected, got = names
        raise InputError(f"{where}: expected one of {', '.join(expected)}, got {got}")


def _same_values(a: Weight, b: Weight, dtype: torch.dtype | None) -> bool:
    """Whether two stored tensors become the same weights in `dtype` (None: in the one of the two
    that holds both)."""
    dtype = dtype or torch.promote_types(a.dtype, b.dtype)
    pairs = zip(a.rows(4096), b.rows(4096), strict=True)
    return all(torch.equal(x.to(dtype), y.to(dtype)) for x, y in pairs)
