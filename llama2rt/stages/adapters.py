"""What a stage leaves: its model, and where it trained an adapter, that too."""

from pathlib import Path

import torch

from llama2rt.checkpoint import adapter, load, native
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.adapters import layers
from llama2rt.parallel import on_main, world
from llama2rt.parallel.saving import save_model, trained_weights
from llama2rt.run import Run
from llama2rt.text.tokenizer import Tokenizer


def save(model: Llama | ScalarModel, tokenizer: Tokenizer, run: Run, init: Path | None) -> None:
    """Write the run's model folder. Of an adapted model, which began as the one in `init`, it is
    a whole model too, which whatever reads model folders reads: the adapter is merged, in fp32,
    into `init` as it is stored, and not as the model holds it, which may have rounded it to bf16.
    The adapter alone goes beside it, in peft's format. Every rank calls this."""
    if not layers(model):
        save_model(model, tokenizer, run.model_directory)
        return
    assert init is not None  # the recipes' own check
    weights = None if world().size == 1 else trained_weights(model)

    def write() -> None:
        whole, _ = load(init, "cpu", torch.float32)
        if isinstance(model, ScalarModel):
            if isinstance(whole, Llama):
                whole = ScalarModel.from_llama(whole)
            whole.normalization = model.normalization
        adapter.merge(model, whole, weights)
        native.save(whole, tokenizer, run.model_directory)
        adapter.save(model, run.adapter_directory, init, weights)

    on_main(write)
