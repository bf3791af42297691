"""Model folders on disk: written whole or not at all, read tensor by tensor with errors that name.

Weights are safetensors in Hugging Face's layout (one `model.safetensors`, or shards and an index),
for this project's own folders too, so that one reader and one writer serve both. Neither holds more
than a tensor at a time; safetensors' own writer wants all of a file at once.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama2rt import atomic
from llama2rt.checkpoint.weights import Area, Stored, Weight
from llama2rt.errors import InputError

SHARD_BYTES = 5 << 30  # Hugging Face's own default size
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors' spelling of what a model may hold, in the order in which it lays them out.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_SPELLING = {dtype: name for name, dtype in _DTYPES.items()}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends without an error.

    A model folder already there is replaced by renames, so that a reader finds the old or the new
    one; anything else there is an InputError, because it may not be ours to delete. OSError where
    the disk does not take it: what stood there is still there.
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise InputError(f"{folder}: exists and is not a model folder; choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    fresh = scratch / "new"
    fresh.mkdir()
    try:
        yield fresh
        for path in [*fresh.iterdir(), fresh]:
            atomic.sync(path)
        if folder.exists():
            folder.rename(scratch / "old")
        fresh.rename(folder)
        atomic.sync(folder.parent)
    finally:
        if (scratch / "old").exists() and not folder.exists():
            (scratch / "old").rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or "params.json" in names or {"config.json", SINGLE} <= names or INDEX in names


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
    weights: Mapping[str, Weight],
    write_others: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder: one safetensors file, or files of at most `shard_bytes` and an index,
    and beside them what `write_others` puts into the new folder.

    All ranks of a group call it. They fetch each weight together, rank 0 writes, and its error is
    raised on every rank, marked `everywhere`.
    """
    fetched = ((name, weights[name].read()) for name in weights)
    error: Exception | None = None
    if not _in_group() or dist.get_rank() == 0:
        try:
            with new_folder(Path(folder)) as fresh:
                write_others(fresh)
                try:
                    _write_tensors(fresh, weights, fetched, shard_bytes)
                except OSError as full:
                    reason = f"{folder}: this model could not be written ({full})"
                    raise OSError(reason) from full
        except Exception as failed:
            if not _in_group():
                raise
            error = failed
    if _in_group():
        for _ in fetched:
            pass  # the others of a group wait for whoever does not fetch with them
        error = _from_rank_0(error)
    if error is not None:
        raise error


def _write_tensors(
    folder: Path,
    weights: Mapping[str, Weight],
    fetched: Iterator[tuple[str, Tensor]],
    shard_bytes: int,
) -> None:
    shards: list[dict[str, Weight]] = [{}]
    filled = 0
    for name, weight in weights.items():
        if shards[-1] and filled + weight.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = weight
        filled += weight.nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shard, file))
        write_safetensors(folder / file, shard, fetched)
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in weights.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_safetensors(
    path: Path, weights: Mapping[str, Weight], fetched: Iterator[tuple[str, Tensor]]
) -> None:
    """The file that safetensors' own `save_file` would write of these weights, the next ones in
    `fetched`, as they come."""
    order = list(_SPELLING)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(weights, key=lambda name: (order.index(weights[name].dtype), name)):
        begin, end = end, end + weights[name].nbytes
        shape = list(weights[name].shape)
        kind = _SPELLING[weights[name].dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    with open(path, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for _ in weights:
            name, tensor = next(fetched)
            file.seek(8 + len(written) + header[name]["data_offsets"][0])
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            del tensor  # before the next one is fetched


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _from_rank_0(error: Exception | None) -> Exception | None:
    """Rank 0's error, on every rank."""
    errors = [error]
    dist.broadcast_object_list(errors, src=0, device=torch.device("cpu"))
    if errors[0] is not None:
        errors[0].everywhere = True  # type: ignore[attr-defined]
    return errors[0]


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
                    dtype = _DTYPES.get(part.get_dtype()) or file.get_tensor(name).dtype
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
