"""A spread model's whole weights, on rank 0, for files."""

from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2rt.checkpoint import files, native
from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel.parallelize import cut
from llama2rt.parallel.pipeline import PipelinedLlama
from llama2rt.parallel.world import is_main, on_main, world
from llama2rt.text.tokenizer import Tokenizer


def save_model(model: Llama | ScalarModel, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """`checkpoint.native.save` of a model that may be spread over ranks, all of which call this."""
    if world().size == 1:
        native.save(model, tokenizer, folder)
        return
    weights = whole_state(model)
    on_main(lambda: native.save(model, tokenizer, folder, weights))


def whole_state(model: Llama | ScalarModel, *, trained: bool = False) -> dict[str, Tensor]:
    """Every weight whole, as the masters have it, on rank 0's CPU by parameter name; nothing on the
    others. One is gathered after the other: no other rank ever holds two. `trained`: only those
    that require a gradient.
    """
    cut(model)
    weights = {}
    if isinstance(model, PipelinedLlama):
        for name, weight in model.whole_weights():
            if is_main() and weight is not None:
                weights[name] = weight.cpu()
        return weights
    for name, parameter in files.weights(model).items():
        if trained and not parameter.requires_grad:
            continue
        weight = parameter.detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if is_main():
            weights[name] = weight.cpu()
    return weights
