"""Other weights of the same model, while it serves: what a policy in training hands over."""

from pathlib import Path

import torch

from llama2rt.checkpoint import files, load
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.model import Llama


def read(folder: Path, engine: Engine) -> Llama:
    """The model in `folder`, on the engine's device and in its dtype. InputError where it is of
    another shape, or its tokenizer gives other ids."""
    own = engine.model
    weight = own.output.weight
    model, tokenizer = load(folder, weight.device, weight.dtype)
    if not isinstance(model, Llama) or model.config != own.config:
        raise InputError(f"{folder}: a model of another shape than the one that is served")
    if tokenizer is not None and not engine.tokenizer.agrees_with(tokenizer):
        raise InputError(f"{folder}: its tokenizer is not that of the model that is served")
    return model


@torch.no_grad()
def assign(model: Llama, other: Llama) -> None:
    """Give `model` the weights of `other`, in place. Sessions see that they have changed."""
    weights = files.weights(other)
    for name, parameter in files.weights(model).items():
        parameter.copy_(weights[name])
