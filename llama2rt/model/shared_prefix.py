"""Attention where documents share the tokens they begin with, which are computed once.

Of several answers to one prompt only the first carries the prompt; the others are their own tokens,
at the positions behind it. Causal attention makes that exact: what a token of the prompt becomes
does not depend on what follows it. A document's keys are those of the tokens it shares, wherever
they lie in the batch, and its own: gathered, so that the ops need no layout of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama2rt import ops
from llama2rt.model.tails import Tails
from llama2rt.model.transformer import Attention, Ending, PackedAttention
from llama2rt.ops.embedding import embedding


@dataclass(frozen=True)
class SharedKeys:
    """Which rows of a packed batch of T tokens the tokens of its B documents attend to."""

    rows: Tensor
    """int64 [K], each key's row of the batch: every document's whole text, one behind the other"""
    cu_seqlens: Tensor
    """int32 [B+1], where the documents' keys begin and end in `rows`"""

    def to(self, device: torch.device | str) -> "SharedKeys":
        return SharedKeys(
            self.rows.to(device, non_blocking=True), self.cu_seqlens.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class SharedPrefixAttention:
    """Each token attends to its own document's keys up to itself, where `cu_seqlens` int32 [B+1]
    holds the offsets of the documents' own tokens, or of their last ones: the last of their keys.
    """

    cu_seqlens: Tensor
    keys: SharedKeys

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(
            q,
            self._gather(k),
            self._gather(v),
            self.cu_seqlens,
            cu_seqlens_k=self.keys.cu_seqlens,
        )

    def _gather(self, x: Tensor) -> Tensor:
        """x [T, Hkv, D] -> [K, Hkv, D]."""
        # As a lookup, because its gradient is summed in fp32 and in a fixed order on any device,
        # which index_select's is not.
        return embedding(self.keys.rows, x.flatten(1)).view(-1, *x.shape[1:])


def documents(
    cu_seqlens: Tensor, keys: SharedKeys | None, tails: Tails | None = None
) -> tuple[Attention, Ending | None]:
    """What the tokens of a packed batch attend to, and what their `tails` do in the last block."""

    def attention(queries: Tensor) -> Attention:
        if keys is not None:
            return SharedPrefixAttention(queries, keys)
        return PackedAttention(queries, None if queries is cu_seqlens else cu_seqlens)

    if tails is None:
        return attention(cu_seqlens), None
    return attention(cu_seqlens), Ending(tails.rows, attention(tails.cu_seqlens))
