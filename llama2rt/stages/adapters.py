"""How a stage trains a low-rank adapter: what it loads, and what it leaves.

It leaves a whole model, with the adapter merged into the weights that the stage began with, so that
whatever reads a model folder reads this one; and beside it the adapter alone, in peft's format.
"""

from pathlib import Path

import torch

from llama2rt.checkpoint import adapter, load, native
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.adapters import layers
from llama2rt.run import Run
from llama2rt.stages import loading
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions


def load_to_train(
    folder: Path, tokenizer: Path | None, options: TrainOptions, lora: LoraOptions, seed: int
) -> Llama:
    """The language model in `folder` for an optimizer: in fp32; or, where `lora` says so, frozen in
    the compute dtype under an adapter drawn from `seed`."""
    if lora.rank is None:
        return loading.load_llama(folder, tokenizer)[0]
    model, _ = loading.load_llama(folder, tokenizer, options.dtype)
    lora.adapt(model, seed)
    return model


def save(model: Llama | ScalarModel, tokenizer: Tokenizer, run: Run, init: Path | None) -> None:
    """Write the run's model folder; of an adapted model, which began as the one in `init`, whole,
    and its adapter into the run's directory. The merged weights are in fp32: `init` as it is stored
    and not as the model holds it, which may have rounded it to bf16."""
    if not layers(model):
        native.save(model, tokenizer, run.model_directory)
        return
    assert init is not None  # the recipes' own check
    whole, _ = load(init, "cpu", torch.float32)
    if isinstance(model, ScalarModel) and isinstance(whole, Llama):
        whole = ScalarModel.from_llama(whole)
    adapter.merge(model, whole)
    native.save(whole, tokenizer, run.model_directory)
    adapter.save(model, run.adapter_directory, init)
