"""The loss of transformers' Llama on our op, which never holds the [B, S, V] logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2rt import ops


def loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Cross-entropy in nats, a scalar, of hidden [B, S, D] under an output layer weight [V, D].

    The token at s predicts labels[:, s + 1], or shift_labels[:, s] where they are given; both are
    [B, S]. Targets of ignore_index do not count. The sum is divided by num_items_in_batch, by
    default the number of targets that count. ValueError for another number of targets than tokens.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, targets = hidden.flatten(0, 1), shift_labels.flatten().to(hidden.device)
    if len(targets) != len(hidden):
        raise ValueError(f"labels: expected {len(hidden)}, one a token, got {len(targets)}")
    rows = (targets != ignore_index).nonzero()[:, 0]
    targets = targets.index_select(0, rows)
    # Another negative one is a mistake, and to token_logprob one more token not to predict.
    targets = targets.masked_fill(targets < 0, weight.shape[0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden = hidden.index_select(0, rows)
    logprob = ops.token_logprob(hidden.to(dtype), weight.to(dtype), targets)
    assert isinstance(logprob, Tensor)
    return -logprob.sum() / (len(rows) if num_items_in_batch is None else num_items_in_batch)
