"""`llama2rt.load`: any model folder or GGUF file, whoever wrote it."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from llama2rt.checkpoint import files, gguf, gguf_file, hf, meta, native
from llama2rt.checkpoint.weight import Weight
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.checkpoint.load")

_WEIGHTS = ("model*.safetensors", files.INDEX, "pytorch_model*.bin", "consolidated*.pth")


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Llama | ScalarModel, Tokenizer | None]:
    """(model, tokenizer) from a folder of this project, of Hugging Face or of Meta, or from a GGUF
    file (of a model in several files, any one).

    A folder's kind is read from its files: params.json (Meta), or config.json with (this project)
    or without (Hugging Face) `"format": "llama2rt"`. Returns a ScalarModel where the folder holds
    one; the tokenizer is None where it has none. dtype None keeps the stored one. On the device
    "meta" nothing but names, shapes and dtypes is read. InputError names the file and key that
    cannot be read.
    """
    model, tokenizer, weights = read(path, dtype)
    files.fill(model, weights, device)
    return model, tokenizer


def load_sharded(path: str | Path, model: Llama | ScalarModel, device: torch.device | str) -> None:
    """Fill a model that is spread over ranks with the weights in a folder, of which each rank reads
    its own parts, one tensor at a time.

    `model`: what `load(path, "meta")` returned and `parallelize` cut up, or a pipeline's stage of
    it; on the meta device still, in whose place come tensors on `device`, or on that already. What
    was added to a model on the meta device and has values, such as an adapter or another head,
    keeps them. Each parameter keeps its dtype. InputError as of `load`, and where the folder lacks
    a parameter.
    """
    # Here, because torch.distributed.checkpoint takes a second to import.
    from llama2rt.checkpoint.sharded import materialize, place

    _, _, weights = read(path)
    own = files.weights(model)
    added: dict[str, Tensor] = {}
    if any(parameter.is_meta for parameter in own.values()):
        added = {n: p.detach().clone() for n, p in own.items() if not p.is_meta}
    materialize(model, device)
    for name, parameter in files.weights(model).items():
        stored = name.replace(".base_layer.", ".")  # below an adapter
        if name in added:
            parameter.detach().copy_(added[name])
        elif stored in weights:
            place(parameter, weights[stored])
        else:
            raise InputError(f"{path}: {stored}: missing")


def read(
    path: str | Path, dtype: torch.dtype | None = None
) -> tuple[Llama | ScalarModel, Tokenizer | None, dict[str, Weight]]:
    """(model on the meta device, tokenizer, weights that are still to be read, by parameter name);
    as `load`, which reads them."""
    folder = Path(path)
    if folder.is_file():
        if not gguf_file.is_gguf(folder):
            raise InputError(f"{folder}: neither a model folder nor a GGUF file")
        return gguf.read(folder, dtype)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    config = folder / "config.json"
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and any(folder.glob("adapter_model*")):
        merge = "merge it into its model (peft's merge_and_unload)"
        if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            raise InputError(f"{adapter}: adapters are not read; {merge}")
        # transformers applies it where peft is installed, and does as here where it is not.
        logger.warning("%s: the model beside it is read, without this adapter; %s", adapter, merge)
    if config.is_file():
        reader = native if files.read_json(config).get("format") == native.FORMAT else hf
        return reader.read(folder, dtype)
    if (folder / "params.json").is_file():
        return meta.read(folder, dtype)
    hint = ""
    if (folder / "model" / "config.json").is_file():
        hint = f"; its model is in {folder / 'model'}"
    elif found := sorted(folder.glob("*.gguf")):
        hint = f"; name the GGUF file itself, such as {found[0]}"
    raise InputError(f"{folder}: no config.json and no params.json, so not a model folder{hint}")
