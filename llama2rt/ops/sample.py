"""Tokens from logits that no limit cuts: on a CPU a kernel that stores no probabilities.

No op of the public contract: nothing of it is differentiable, and elsewhere torch's own calls do.
"""

import torch
from torch import Tensor

from llama2rt.ops import backend
from llama2rt.ops.packed import native


def usable(logits: Tensor) -> bool:
    """Whether `draw` takes these logits."""
    return (
        type(logits) is Tensor
        and logits.dtype == torch.float32
        and logits.device.type == "cpu"
        and logits.stride(-1) == 1
        and logits.shape[1] > 0
        and backend.resolve(logits) == "cpu"
    )


def draw(logits: Tensor, temperatures: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits [B, V], temperatures fp32 [B], uniform float64 [B] in (0, 1) -> (tokens int64
    [B], their log-probabilities fp32 [B]).

    The first token whose cumulative probability exceeds `uniform`, summed in fp64; at temperature 0
    the largest logit's, the first of equals, with the log-probability of temperature 1. NaN where
    the logits have no distribution.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty(len(logits))
    native().sample(logits, temperatures, uniform, tokens, logprobs, torch.get_num_threads())
    return tokens, logprobs
