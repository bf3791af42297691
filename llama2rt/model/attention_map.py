"""How strongly the tokens of one dialogue attend to each other: the numbers of Llama 2's Figure 9.

The figure shows the maximum activation over the whole network, with neighbouring tokens binned. The
forward pass is the model's own but for its attention, which is computed in plain torch here, some
rows of queries at a time: what is held is [heads, rows, T] and the bins, never [T, T].
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llama2rt.model.llama import Llama

_WEIGHTS_AT_ONCE = 1 << 22  # 16 MiB of fp32 attention weights


class AttentionMap(NamedTuple):
    """The largest attention weights over all layers and heads, fp32 in [0, 1] on the CPU."""

    bins: Tensor
    """[B, B]: of any token of a row's bin to any token of a column's; 0 above the diagonal"""
    to_span: Tensor
    """[T]: of each token to any token of the span; 0 before it"""


@dataclass
class _Recording:
    """The `Attention` of one document, which keeps the largest weights."""

    bins: Tensor
    to_span: Tensor
    edges: list[int]
    """[B + 1]: where the bins begin and end, in tokens"""
    span: slice

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, heads, width = q.shape
        keys = k.float().repeat_interleave(heads // k.shape[1], dim=1).permute(1, 2, 0)
        values = v.float().repeat_interleave(heads // v.shape[1], dim=1).transpose(0, 1)
        position = torch.arange(tokens, device=q.device)
        out = torch.empty_like(q)
        rows = max(1, _WEIGHTS_AT_ONCE // (heads * tokens))
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            scores = q[part].float().transpose(0, 1) @ keys / width**0.5
            scores.masked_fill_(position > position[part, None], float("-inf"))
            weights = scores.softmax(-1)  # [heads, rows, T]
            out[part] = (weights @ values).transpose(0, 1).to(q.dtype)
            self._keep(weights.amax(0), part)
        return out

    def _keep(self, largest: Tensor, part: slice) -> None:
        """largest [rows, T]: over heads, of the queries in `part`."""
        spans = list(itertools.pairwise(self.edges))
        columns = torch.stack([largest[:, begin:end].amax(1) for begin, end in spans], dim=1)
        for i, (begin, end) in enumerate(spans):
            rows = columns[max(0, begin - part.start) : max(0, end - part.start)]
            if len(rows):
                self.bins[i] = torch.maximum(self.bins[i], rows.amax(0))
        to_span = largest[:, self.span].amax(-1)
        self.to_span[part] = torch.maximum(self.to_span[part], to_span)


@torch.no_grad()
def attention_map(model: Llama, tokens: list[int], span: slice, bins: int = 48) -> AttentionMap:
    """The largest attention weights of `model` on one document of T `tokens`: in `bins` bins of
    neighbouring tokens (T where that is fewer), and to the tokens of `span`, which is not empty.
    Of a model that is cut over tensor ranks these are this rank's heads'."""
    device = model.output.weight.device
    count = min(bins, len(tokens))
    recording = _Recording(
        torch.zeros(count, count, device=device),
        torch.zeros(len(tokens), device=device),
        [-(-i * len(tokens) // count) for i in range(count + 1)],
        span,
    )
    document = torch.tensor(tokens, device=device)
    positions = torch.arange(len(tokens), dtype=torch.int32, device=device)
    model.transformer(document, positions, recording)
    return AttentionMap(recording.bins.cpu(), recording.to_span.cpu())
