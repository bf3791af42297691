"""Model folders on disk: written whole or not at all, read tensor by tensor with errors that name.

Weights are safetensors in Hugging Face's layout (one `model.safetensors`, or shards and an index),
for this project's own folders too, so that one reader and one writer serve both. Neither holds more
than a tensor at a time; safetensors' own writer wants all of a file at once.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llama2rt import atomic
from llama2rt.checkpoint.weight import Area, Stored, Weight
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel

logger = logging.getLogger("llama2rt.checkpoint.files")

LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARD_BYTES = 5 << 30  # Hugging Face's own default size
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# safetensors' spelling of what a model may hold, in the order in which it lays them out.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_SPELLING = {dtype: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends without an error.

    A model's or an adapter's folder already there is replaced by renames, so that a reader finds
    the old or the new one; anything else there is an InputError, because it may not be ours to
    delete. OSError where the disk does not take it: what stood there is still there.
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise InputError(f"{folder}: exists and is not a model folder; choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = f".{folder.name}.{os.getpid()}."
    scratch = Path(tempfile.mkdtemp(atomic.PARTIAL, begin, folder.parent))
    fresh, old = scratch / atomic.NEW, scratch / atomic.OLD
    fresh.mkdir()
    try:
        yield fresh
        for path in [*fresh.iterdir(), fresh]:
            atomic.sync(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        atomic.sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    whole = ({"params.json"}, {"config.json", SINGLE}, {INDEX}, {ADAPTER_CONFIG, ADAPTER})
    return not names or any(files <= names for files in whole)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError naming the file (and line) otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_model(
    folder: str | Path,
    stored: Mapping[str, Weight],
    write_others: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder: one safetensors file, or files of at most `shard_bytes` and an index,
    and beside them what `write_others` puts into the new folder. Each weight is read once, in the
    order of `stored`, and held until it is written."""
    with new_folder(Path(folder)) as fresh:
        write_others(fresh)
        try:
            _write_tensors(fresh, stored, shard_bytes)
        except OSError as error:
            raise OSError(f"{folder}: this model could not be written ({error})") from error


def _write_tensors(folder: Path, stored: Mapping[str, Weight], shard_bytes: int) -> None:
    shards: list[dict[str, Weight]] = [{}]
    filled = 0
    for name, weight in stored.items():
        if shards[-1] and filled + weight.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = weight
        filled += weight.nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shard, file))
        write_safetensors(folder / file, shard)
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in stored.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_safetensors(path: Path, stored: Mapping[str, Weight]) -> None:
    """The file that safetensors' own `save_file` would write, but a tensor at a time."""
    order = list(_SPELLING)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(stored, key=lambda name: (order.index(stored[name].dtype), name)):
        begin, end = end, end + stored[name].nbytes
        shape = list(stored[name].shape)
        kind = _SPELLING[stored[name].dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    with open(path, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for name, weight in stored.items():
            file.seek(8 + len(written) + header[name]["data_offsets"][0])
            values = weight.read().contiguous().view(-1).view(torch.uint8)
            file.write(values.numpy().data)
            del values  # before the next one is read


def stored_weights(folder: Path) -> Iterator[Stored]:
    """Every tensor in a folder's safetensors."""
    index = folder / INDEX
    files: dict[Path, set[str]] = {}
    if (folder / SINGLE).is_file():
        files[folder / SINGLE] = set()  # all it holds
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: weight_map: expected an object of tensor names to files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..", "."):
                raise InputError(
                    f"{index}: weight_map: {name}: expected the name of a file in this folder, "
                    f"got {file!r}"
                )
            files.setdefault(folder / file, set()).add(name)
    else:
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = "; {} is a pickle, which can run code: save it again as safetensors"
        raise InputError(
            f"{folder}: no {SINGLE} and no {INDEX} in this folder"
            + (hint.format(pickled[0]) if pickled else "")
        )
    for path, names in files.items():
        if not path.is_file():
            raise InputError(f"{path}: listed in {index.name} but missing")
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                for name in sorted(names or present):
                    if name not in present:
                        raise InputError(f"{path}: {name}: listed in {index.name} but missing")
                    part = file.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype()) or file.get_tensor(name).dtype
                    shape = torch.Size(part.get_shape())
                    yield path, name, Weight(shape, dtype, _Fetch(path, name))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged or not safetensors: {error}") from None


class _Fetch:
    """Reads from one tensor of a file, which is open only meanwhile: a mapped file's pages count as
    this process's memory."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __call__(self, area: Area) -> Tensor:
        try:
            with safe_open(self._path, framework="pt") as file:
                part = file.get_slice(self._name)
                return part[area] if area else file.get_tensor(self._name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._path}: damaged or not safetensors: {error}") from None


OUTPUT, EMBEDDING = "output.weight", "transformer.embedding.weight"
"""parameters of a `Llama`, which a tied one shares"""


def weights(model: Llama | ScalarModel) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied output once, under the embedding's name (as in transformers)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if model.config.tied:
        named.pop(OUTPUT, None)
    return named


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
    wanted = weights(model)
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
    model: Llama | ScalarModel, read: Mapping[str, Weight], device: torch.device | str
) -> None:
    """Give a model built on the meta device its weights (`match`); on that device, only their
    dtype."""
    for name, weight in read.items():
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
