"""Adapter folders in peft's format, and whole models with an adapter merged into them.

The names are those that peft gives an adapter of transformers' Llama, so that peft puts the folder
on the Hugging Face export of the model it was trained on (`PeftModel.from_pretrained`). Weights are
the fp32 masters of the optimizer, as in model folders (`native.unrounded`).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama2rt.checkpoint import files
from llama2rt.checkpoint.hf import hf_name
from llama2rt.checkpoint.native import unrounded
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.adapters import NAME, layers, require_peft

_PREFIX = "base_model.model."  # PeftModel around LoraModel around the model


@torch.no_grad()
def merge(
    model: Llama | ScalarModel,
    base: Llama | ScalarModel,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Add the adapter of `model` to the weights of `base`, in place and in fp32: alpha / rank * B A
    for each layer that has one. Other weights that were trained (a head) take the place of
    base's.

    `base` is the model that `model` was before `adapters.adapt`, loaded anew: `model` itself may
    hold it rounded to bf16, which what it becomes must not be. `weights`: what was trained, by
    parameter name, where `model` itself holds parts of it alone.
    """
    adapted = layers(model)
    trained = weights or _weights(model)
    for name, layer in adapted.items():
        a, b = (trained[f"{name}.lora_{matrix}.{NAME}.weight"] for matrix in "AB")
        weight = base.get_parameter(f"{name}.weight")
        weight.add_((b.float() @ a.float() * layer.scaling[NAME]).to(weight.device))
    for name, tensor in trained.items():
        if ".lora_" not in name:
            base.get_parameter(name).copy_(tensor)


def save(
    model: Llama | ScalarModel,
    folder: str | Path,
    base: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter of `model` to `folder` atomically; an adapter already there is replaced.
    `base` is the folder of the model that it was trained on, for whoever reads its description;
    `weights` as for `merge`."""
    adapted = layers(model)
    layer = next(iter(adapted.values()))
    scalar = isinstance(model, ScalarModel)
    config = require_peft().LoraConfig(
        base_model_name_or_path=str(base),
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=layer.r[NAME],
        lora_alpha=layer.lora_alpha[NAME],
        target_modules=sorted({hf_name(f"{name}.weight").split(".")[-2] for name in adapted}),
        modules_to_save=["score"] if scalar else None,
        inference_mode=True,
    )
    trained = weights or _weights(model)
    tensors = {peft_name(name): tensor for name, tensor in trained.items()}
    with files.new_folder(Path(folder)) as fresh:
        config.save_pretrained(fresh)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, fresh / files.ADAPTER, metadata={"format": "pt"})


@torch.no_grad()
def load(model: Llama | ScalarModel, folder: str | Path) -> None:
    """Give an adapted `model` the adapter that `save` wrote to `folder`, in fp32. InputError naming
    file and tensor where it is damaged or of another shape."""
    path = Path(folder) / files.ADAPTER
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not safetensors: {error}") from None
    for name, parameter in _trained(model):
        stored = tensors.pop(peft_name(name), None)
        if stored is None or stored.shape != parameter.shape:
            found = "missing" if stored is None else f"has shape {list(stored.shape)}"
            raise InputError(
                f"{path}: {peft_name(name)}: expected shape {list(parameter.shape)}, {found}"
            )
        parameter.data = stored.to(parameter.device)
        if hasattr(parameter, "master"):
            del parameter.master  # of an optimizer that trained it before
    if tensors:
        raise InputError(f"{path}: {min(tensors)}: not part of this adapter")


def peft_name(name: str) -> str:
    """What peft calls one of the parameters of an adapted model that are trained."""
    layer, lora, matrix = name.partition(".lora_")
    if not lora:
        return _PREFIX + hf_name(name)
    return (
        _PREFIX
        + hf_name(f"{layer}.weight").removesuffix("weight")
        + "lora_"
        + (matrix.replace(f".{NAME}.", "."))
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: unrounded(parameter) for name, parameter in _trained(model)}


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
