"""token_logprob over tiles of logits, for backends whose kernels take one tile at a time.

Logits exist only as tiles in a buffer that is used again: a matrix product makes one, and a kernel
folds it into the running statistics of its rows, or turns it into its gradient in place. What the
kernels compute is theirs; here are the order of the tiles and the memory. The Triton backend forms
and uses a tile inside one kernel, and has no use for this.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama2rt.ops.composed import tiles


@dataclass(frozen=True)
class Tiles:
    rows: int
    """Tokens whose logits are held at one time."""
    columns: int
    """Vocabulary whose gradient is held at one time."""
    strip: int
    """Vocabulary whose logits are made and used at one time."""


class Kernels(Protocol):
    """What a backend brings. Statistics and gradients of rows are fp32 [rows]."""

    def fold(
        self,
        logits: Tensor,
        targets: Tensor,
        first: int,
        scale: float,
        peak: Tensor,
        total: Tensor,
        weighted: Tensor | None,
        chosen: Tensor,
    ) -> None:
        """Counts in a tile that begins at column `first` of the vocabulary.

        peak is the largest logit so far, total the sum of exp(x) and weighted that of x exp(x),
        with x = (logit - peak) * scale. chosen becomes the logit of a row's target, if it is here.
        """

    def differentiate(
        self,
        logits: Tensor,
        targets: Tensor,
        first: int,
        scale: float,
        lse: Tensor,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        entropy: Tensor | None,
    ) -> None:
        """Puts the gradient of a tile in the place of its logits; 0 in rows without a target."""

    def product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out = a @ b, in out's dtype, which is that of a and b, rounded once."""

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total (fp32, contiguous) += a @ b."""


def _buffer(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] for logits, each row beginning on 32 bytes."""
    return hidden.new_empty(rows, -(-columns // 16) * 16)


def forward(
    kernels: Kernels,
    size: Tiles,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D] -> (logprob [T] fp32, entropy [T] or [0], log-sum-exp [T]).

    A target that is in no tile, being at least V, has a log-probability of NaN.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.long().contiguous()
    peak, total, weighted, chosen = hidden.new_zeros(4, tokens, dtype=torch.float32)
    peak.fill_(torch.finfo(torch.float32).min)
    chosen.fill_(torch.nan)
    scale = 1 / temperature
    buffer = _buffer(hidden, min(tokens, size.rows), min(vocabulary, size.strip))
    for rows in tiles(tokens, size.rows):
        for part in tiles(vocabulary, size.strip):
            logits = buffer[: rows.stop - rows.start, : part.stop - part.start]
            torch.mm(hidden[rows], weight[part].T, out=logits)
            kernels.fold(
                logits,
                targets[rows],
                part.start,
                scale,
                peak[rows],
                total[rows],
                weighted[rows] if entropy else None,
                chosen[rows],
            )
    predicted, log_total = targets >= 0, total.log()
    logprob = torch.where(predicted, (chosen - peak) * scale - log_total, 0.0)
    lse = log_total + peak * scale
    if not entropy:
        return logprob, logprob.new_empty(0), lse
    return logprob, torch.where(predicted, log_total - weighted / total, 0.0), lse


def backward(
    kernels: Kernels,
    size: Tiles,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight)."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.long().contiguous()
    dlogprob, lse = dlogprob.contiguous(), lse.contiguous()
    if dentropy is not None and entropy is not None:
        dentropy, entropy = dentropy.contiguous(), entropy.contiguous()
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    one_tile = 0 < tokens <= size.rows
    buffer = _buffer(hidden, min(tokens, size.rows), min(vocabulary, size.columns))
    for part in tiles(vocabulary, size.columns):
        slice_of_weight = weight[part]
        # One tile of rows gives the weight gradient at once; over several it is summed in fp32.
        accumulated = (
            None if one_tile else weight.new_zeros(slice_of_weight.shape, dtype=torch.float32)
        )
        for rows in tiles(tokens, size.rows):
            dlogits = buffer[: rows.stop - rows.start, : part.stop - part.start]
            for strip in tiles(dlogits.shape[1], size.strip):
                logits = dlogits[:, strip]
                torch.mm(hidden[rows], slice_of_weight[strip].T, out=logits)
                kernels.differentiate(
                    logits,
                    targets[rows],
                    part.start + strip.start,
                    1 / temperature,
                    lse[rows],
                    dlogprob[rows],
                    None if dentropy is None else dentropy[rows],
                    None if entropy is None else entropy[rows],
                )
            kernels.add_product(dhidden[rows], dlogits, slice_of_weight)
            if accumulated is None:
                kernels.product(dweight[part], dlogits.T, hidden[rows])
            else:
                kernels.add_product(accumulated, dlogits.T, hidden[rows])
        if accumulated is not None:
            dweight[part] = accumulated
    return dhidden.to(hidden.dtype), dweight
