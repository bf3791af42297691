"""A spread model's whole weights, on rank 0, for files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama2rt.checkpoint import files, native
from llama2rt.checkpoint.weight import Area, Weight
from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel.pipeline import PipelinedLlama
from llama2rt.parallel.shards import cut, whole_tensor
from llama2rt.parallel.whole import whole_tensors
from llama2rt.parallel.world import is_main, on_main, world
from llama2rt.text.tokenizer import Tokenizer


def save_model(
    model: Llama | ScalarModel,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    save: Callable[..., None] = native.save,
) -> None:
    """`save`, which may be `checkpoint.hf.save` too, of a model that may be spread over ranks, all
    of which call this. A tensor is put together when rank 0 is about to write it, so that no rank
    ever holds two; rank 0's error is every rank's."""
    if world().size == 1:
        save(model, tokenizer, folder)
        return
    cut(model)
    passing = _whole_weights(model)
    failed: Exception | None = None
    if is_main():
        shapes = files.weights(model.shape if isinstance(model, PipelinedLlama) else model)
        dtype = next(iter(files.weights(model).values())).dtype
        weights = {
            name: Weight(shape.shape, dtype, _Next(name, passing)) for name, shape in shapes.items()
        }
        try:
            save(model, tokenizer, folder, weights=weights)
        except Exception as error:
            failed = error
    for _ in passing:
        pass  # the other ranks wait for one that no longer gathers with them

    def outcome() -> None:
        if failed is not None:
            raise failed

    on_main(outcome)


class _Next:
    """Fetches a weight out of those that pass by, each once."""

    def __init__(self, name: str, passing: Iterator[tuple[str, Tensor | None]]) -> None:
        self._name, self._passing = name, passing

    def __call__(self, area: Area) -> Tensor:
        name, weight = next(self._passing)
        assert name == self._name and weight is not None, f"{self._name} asked for, {name} is next"
        return weight[area]


def _whole_weights(model: Llama | ScalarModel) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) in turn, on rank 0 alone. All ranks must go through all of them."""
    if isinstance(model, PipelinedLlama):
        yield from model.whole_weights()
        return
    yield from whole_tensors(model)


@torch.no_grad()
def trained_weights(model: Llama | ScalarModel) -> dict[str, Tensor]:
    """Every weight that requires a gradient, whole, as the masters have it, on rank 0's CPU by
    parameter name; nothing on the others. For adapters, which are small."""
    cut(model)
    weights = {}
    for name, parameter in files.weights(model).items():
        if parameter.requires_grad:
            whole = whole_tensor(parameter.detach())
            if is_main():
                weights[name] = whole.cpu()
    return weights
