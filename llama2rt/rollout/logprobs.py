"""Log-probabilities and values of response tokens, by the path that training takes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llama2rt.algorithms.advantages import exact_kl
from llama2rt.data.loader import dealt
from llama2rt.data.packing import Batch, Example, filler, micro_batches, pack
from llama2rt.model import ScalarModel
from llama2rt.parallel import Mesh, faults
from llama2rt.rollout.frozen import phase

TILE_ELEMENTS = 1 << 22
"""logits of one model that `response_kl` holds at once: 16 MiB"""


def inference_batches(
    examples: Sequence[Example],
    micro_tokens: int,
    device: torch.device,
    packed: Callable[[Sequence[Example]], Batch] = pack,
) -> list[Batch]:
    """Packed in order, on `device`."""
    return [batch.to(device) for batch in micro_batches(examples, micro_tokens, packed)]


@phase
@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    examples: Sequence[Example],
    temperature: float,
    micro_tokens: int,
    packed: Callable[[Sequence[Example]], Batch] = pack,
    mesh: Mesh | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy fp32 [R] of all response tokens, in order, by a language model.

    `temperature` must be the one the responses were sampled at: log-probabilities at another one
    belong to another policy, and a KL computed from them comes out negative or exploding.
    `packed`: as training packs them; `data.shared.pack_shared` where prompts are computed once.
    The ranks of `mesh` read a share of the micro-batches each, and all have all of it.
    """
    mesh = mesh or Mesh.single()
    device = next(model.parameters()).device
    micros = list(micro_batches(examples, micro_tokens, packed))
    begins = np.cumsum([0, *(int((micro.targets >= 0).sum()) for micro in micros)]).tolist()
    found = torch.zeros(2, begins[-1], device=device)
    numbered = zip(begins, micros, strict=False)
    for begin, micro in dealt(numbered, mesh.share, (begins[-1], filler())):
        faults.moved()
        batch = micro.to(device)
        logprob, entropy = model(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            batch.targets,
            keys=batch.keys,
            tails=batch.tails,
            temperature=temperature,
            entropy=True,
        )
        own = torch.stack([logprob, entropy])[:, batch.targets >= 0]
        found[:, begin : begin + own.shape[1]] = own
    logprob, entropy = mesh.sum(found)  # each rank has zeros where others have read
    return logprob, entropy


@phase
@torch.no_grad()
def response_kl(
    reference: Any,
    policy: Any,
    examples: Sequence[Example],
    temperature: float,
    micro_tokens: int,
) -> Tensor:
    """KL(policy || reference) fp32 [R] before each response token, of the whole distributions that
    its estimates (`advantages.kl`) take one token from, aligned with `response_logprobs`.

    Logits exist in tiles of some rows, in fp32 whatever the weights' dtype.
    """
    weights = [model.output.weight for model in (policy, reference)]
    rows = max(1, TILE_ELEMENTS // weights[0].shape[0])
    parts = []
    for batch in inference_batches(examples, micro_tokens, weights[0].device):
        faults.moved()
        packed = batch.tokens, batch.positions, batch.cu_seqlens
        predicts = batch.targets >= 0
        hidden = [model.hidden(*packed)[predicts] for model in (policy, reference)]
        for tile in zip(*(h.split(rows) for h in hidden), strict=True):
            logits = [
                h.float() @ weight.float().T / temperature
                for h, weight in zip(tile, weights, strict=True)
            ]
            parts.append(exact_kl(*logits))
    return torch.cat(parts)


@torch.no_grad()
def response_values(critic: ScalarModel, examples: Sequence[Example], micro_tokens: int) -> Tensor:
    """Value fp32 [R] of the state before each response token, aligned with `response_logprobs`."""
    parts = []
    for batch in inference_batches(examples, micro_tokens, critic.head.weight.device):
        faults.moved()
        layout = batch.tokens, batch.positions, batch.cu_seqlens
        values = critic(*layout, tails=batch.tails)
        parts.append(values[batch.targets >= 0])
    return torch.cat(parts)


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive segments: [T] and int64 [B] -> [B], at least fp32; differentiable,
    deterministic."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))  # else bf16 stops at 256
    return torch.segment_reduce(wide, "sum", lengths=lengths, initial=0)


def token_rows(cu_responses: Tensor, members: Tensor) -> Tensor:
    """int64 [sum of lengths]: indices of the members' tokens among all response tokens."""
    lengths = cu_responses.diff()[members]
    begins = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(cu_responses[members] - begins, lengths) + torch.arange(
        int(lengths.sum()), device=lengths.device
    )
