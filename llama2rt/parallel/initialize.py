"""Fresh weights for a model that is spread over ranks: those that one process would draw."""

import torch

from llama2rt.checkpoint.weight import of_tensor
from llama2rt.model import Llama, ScalarModel


def initialize(model: Llama | ScalarModel, seed: int, device: torch.device | str) -> None:
    """Give a model on the meta device, cut up by `parallelize` or a pipeline's stage, its parts of
    the weights that `model.initialize(seed)` would give the whole; on `device`.

    Each rank draws every tensor in full, one at a time, and keeps what is its own.
    """
    # Here, because torch.distributed.checkpoint takes a second to import.
    from llama2rt.checkpoint.sharded import materialize, place

    kind = ScalarModel if isinstance(model, ScalarModel) else Llama
    with torch.device("meta"):
        whole = kind(model.config)  # a stage has not all names, whose order decides what is drawn
    materialize(model, device)
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, values in whole.fresh_weights(seed):
        if name in own:
            place(own[name], of_tensor(values))
