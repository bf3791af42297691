"""This project's own model folder: config.json, model.safetensors under our names, the tokenizer.

What stages write and read between each other. The file names and the sharding are Hugging Face's,
the tensor names ours (`stored_name`). Weights are those that the model's optimizer holds, not their
rounded copies: `train.precision` has the rule.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama2rt.checkpoint import files
from llama2rt.checkpoint.weight import Weight, of_tensor
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.model.heads import Normalization
from llama2rt.text.tokenizer import Tokenizer

FORMAT = "llama2rt"
UNREAD = "unread"
KINDS: dict[str, type[Llama] | type[ScalarModel]] = {"llama": Llama, "scalar": ScalarModel}


def save(
    model: Llama | ScalarModel,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    weights: Mapping[str, Weight] | None = None,
) -> None:
    """Write `folder` atomically; a model folder already there is replaced.

    Of a model under a `train.Optimizer` the fp32 masters are written, not their bf16 copies.
    `weights`: those to write in place of the model's own, by parameter name; each is read once, in
    that order.
    """
    kind = next(name for name, cls in KINDS.items() if isinstance(model, cls))
    if weights is None:
        own = files.weights(model).items()
        weights = {name: of_tensor(unrounded(parameter)) for name, parameter in own}
    shape = dataclasses.asdict(model.config)
    description: dict[str, Any] = {"format": FORMAT, "kind": kind, "config": shape}
    if isinstance(model, ScalarModel) and model.normalization != Normalization():
        description["normalization"] = dataclasses.asdict(model.normalization)
    if isinstance(model, ScalarModel) and model.unread is not None:
        description[UNREAD] = model.unread

    def write_others(fresh: Path) -> None:
        files.write_json(fresh / "config.json", description)
        if tokenizer is not None:
            tokenizer.save(fresh)

    stored = {stored_name(model, name): weight for name, weight in weights.items()}
    files.write_model(folder, stored, write_others)


def stored_name(model: torch.nn.Module, name: str) -> str:
    """What a parameter of `model` is called in model folders and run checkpoints.

    A module's name follows from the code, and a parallelism plan needs it; a file's must stay. So
    files leave out `transformer.` (of a ScalarModel they say `backbone.`), and the `.weight` of
    `output`. Other modules' names are their own.
    """
    if isinstance(model, Llama) and name == files.OUTPUT:
        return "output"
    if isinstance(model, Llama | ScalarModel) and name.startswith("transformer."):
        outer = "backbone." if isinstance(model, ScalarModel) else ""
        return outer + name.removeprefix("transformer.")
    return name


def unrounded(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 master that an optimizer keeps of `parameter`, or the parameter where there is none.

    A master counts only while the parameter is its rounding: one that was changed since by other
    hands (`load_state_dict`, an edit in place) is itself the truth.
    """
    master = getattr(parameter, "master", None)
    if master is None or not torch.equal(master.to(parameter), parameter):
        return parameter.detach()
    return master


def read(
    folder: Path, dtype: torch.dtype | None
) -> tuple[Llama | ScalarModel, Tokenizer | None, dict[str, Weight]]:
    """(model on the meta device, tokenizer, weights to read) of what `save` wrote; InputError
    naming file and key for a damaged or foreign folder."""
    path = folder / "config.json"
    description = files.read_json(path)
    if description.get("format") != FORMAT:
        raise InputError(f"{path}: format: expected {FORMAT!r}, got {description.get('format')!r}")
    if description.get("kind") not in KINDS:
        raise InputError(
            f"{path}: kind: expected one of {', '.join(KINDS)}, got {description.get('kind')!r}"
        )
    config = parse_config(path, description.get("config"))
    with torch.device("meta"):
        model = KINDS[description["kind"]](config)
    if isinstance(model, ScalarModel):
        model.normalization = parse_normalization(path, description, "normalization")
        model.unread = parse_id(path, description, UNREAD, config)
    named = functools.partial(stored_name, model)
    weights = files.match(model, files.stored_weights(folder), dtype, named)
    return model, find_tokenizer(folder), weights


def parse_config(path: Path, fields: Any) -> LlamaConfig:
    """LlamaConfig from JSON fields; InputError naming `path` for an impossible one."""
    try:
        return LlamaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def parse_normalization(path: Path, description: Mapping[str, Any], key: str) -> Normalization:
    """Normalization from JSON fields under `key`, where they are; InputError naming `path` and key
    for an impossible one."""
    try:
        return Normalization(**description.get(key, {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {key}: {error}") from None


def parse_id(
    path: Path, description: Mapping[str, Any], key: str, config: LlamaConfig
) -> int | None:
    """A token id of the model from a JSON field, None where there is none; InputError naming `path`
    and key for anything else."""
    found = description.get(key)
    if found is None or (type(found) is int and found < config.vocab_size):
        return None if found is None or found < 0 else found  # -1: LLaMA 1's folders
    raise InputError(f"{path}: {key}: expected an id below {config.vocab_size}, got {found!r}")


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a model folder, or None where it has none."""
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return Tokenizer.load(folder)
    return None
