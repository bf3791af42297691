"""Model folders on disk: written whole or not at all, read tensor by tensor with errors that name.

Weights are safetensors in Hugging Face's layout (one `model.safetensors`, or shards and an index),
for this project's own folders too, so that one reader and one writer serve both.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel

logger = logging.getLogger("llama2rt.checkpoint.files")

LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARD_BYTES = 5 << 30  # Hugging Face's own default size
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


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
    except SafetensorError as error:  # which is what safetensors makes of a full disk
        raise OSError(f"{folder}: this model could not be written ({error})") from error
    finally:
        if (scratch / "old").exists() and not folder.exists():
            (scratch / "old").rename(folder)
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


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as one safetensors file, or as shards of at most `shard_bytes` and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shard, file))
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_file(whole, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of every tensor in a folder's safetensors, one at a time."""
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
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged or not safetensors: {error}") from None


OUTPUT, EMBEDDING = "output.weight", "transformer.embedding.weight"
"""parameters of a `Llama`, which a tied one shares"""


def weights(model: Llama | ScalarModel) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied output once, under the embedding's name (as in transformers)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if model.config.tied:
        named.pop(OUTPUT, None)
    return named


def fill(
    model: Llama | ScalarModel,
    tensors: Iterator[tuple[Path, str, Tensor]],
    device: torch.device | str,
    dtype: torch.dtype | None,
    stored_name: Callable[[str], str],
) -> None:
    """Give a model built on the meta device its weights; InputError for one missing, left over, of
    the wrong shape or of a dtype that is not floating point. `tensors` are (file, name there,
    tensor); `stored_name` turns a parameter's name into the one in the files.

    dtype None keeps the stored one; where the files mix several, all become the one that holds them
    all, and a warning says so. A tied model may come with its output under either name; where it
    comes with two that differ, both are kept and the model is no longer tied, with a warning.
    """
    wanted = weights(model)
    tied = isinstance(model, Llama) and model.config.tied
    name_of = {stored_name(name): name for name in (*wanted, *([OUTPUT] if tied else []))}
    filled: dict[str, nn.Parameter] = {}
    stored: dict[torch.dtype, str] = {}
    # Of a tied model, as the files hold them: on the meta device a parameter has no values to tell
    # one from the other.
    ends: dict[str, Tensor] = {}
    path = None
    for path, shown, tensor in tensors:
        name = name_of.get(shown)
        if name is None:
            raise InputError(f"{path}: {shown}: not part of a model of this configuration")
        _check(f"{path}: {shown}", tensor, wanted[EMBEDDING if tied and name == OUTPUT else name])
        if tied and name in (OUTPUT, EMBEDDING):
            ends[name] = tensor
        stored.setdefault(tensor.dtype, shown)
        # A copy: a mapped file that is truncated later must not take the process with it.
        filled[name] = nn.Parameter(tensor.to(device, dtype, copy=True))
    if tied and OUTPUT in filled and EMBEDDING not in filled:
        filled[EMBEDDING] = filled.pop(OUTPUT)
    missing = sorted(stored_name(name) for name in wanted.keys() - filled.keys())
    if missing:
        raise InputError(f"{path}: {missing[0]}: missing ({len(missing)} tensors in all)")
    if tied and OUTPUT in filled:
        if _same_values(ends[OUTPUT], ends[EMBEDDING], dtype):
            del filled[OUTPUT]
        else:
            logger.warning(
                "%s: the configuration ties the output to the embedding, but %s differs from it: "
                "both are kept, and the model is not tied",
                path,
                stored_name(OUTPUT),
            )
            model.config = model.transformer.config = dataclasses.replace(model.config, tied=False)
    if dtype is None and len(stored) > 1:
        filled = _promoted(path, filled, stored)
    for name, parameter in filled.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
    if isinstance(model, Llama) and model.config.tied:
        model.output.weight = model.transformer.embedding.weight


def _check(where: str, tensor: Tensor, like: Tensor) -> None:
    """InputError unless `tensor` can become `like`."""
    if tensor.shape != like.shape:
        raise InputError(f"{where}: expected shape {list(like.shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in LOADABLE:
        names = (str(dtype).removeprefix("torch.") for dtype in (*LOADABLE, tensor.dtype))
        *expected, got = names
        raise InputError(f"{where}: expected one of {', '.join(expected)}, got {got}")


def _same_values(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether two stored tensors become the same weights in `dtype` (None: in the one of the two
    that holds both)."""
    dtype = dtype or torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype), b.to(dtype))


def _promoted(
    path: Path | None, filled: dict[str, nn.Parameter], stored: dict[torch.dtype, str]
) -> dict[str, nn.Parameter]:
    """All parameters in the one dtype that holds every one in `stored` (with a tensor's name)."""
    common = functools.reduce(torch.promote_types, stored)
    logger.warning(
        "%s: %s; all become %s",
        path,
        ", ".join(f"{name} is {kind}" for kind, name in stored.items()),
        common,
    )
    return {name: nn.Parameter(weight.detach().to(common)) for name, weight in filled.items()}
