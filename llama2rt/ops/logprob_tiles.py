"""token_logprob over tiles of logits, for backends whose kernels take one tile at a time.

Logits exist only as tiles in a buffer that is used again: a matrix product makes one, and a kernel
folds it into the running statistics of its rows, or turns it into its gradient in place. What the
kernels compute is theirs; here are the order of the tiles and the memory. The Triton backend forms
and uses a tile inside one kernel, and has no use for this.

Backward needs every logit again, and making it again is a fourth product beside the three that the
mathematics asks for. Keeping the logits would cost the memory this op exists to save, with two
exceptions, `Stash`: memory that backward needs anyway may hold logits from forward on. The
gradient of `weight`, V x D elements: forward leaves in each slice of it as many of the slice's own
logits as fit, D of T columns, and backward takes them out just before it writes the slice. And the
tile in which backward works: it holds its first tile's logits. So up to D tokens make no logit
twice (but for the columns of a tile beyond a multiple of 16), and more save a share D / T of the
fourth product and a tile.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama2rt.ops.composed import tiles
from llama2rt.ops.tensors import empty_like


@dataclass(frozen=True)
class Tiles:
    rows: int
    """Tokens of a tile."""
    columns: int
    """Vocabulary of a tile."""


# On a CPU; docs/kernels/token_logprob.md tells what each size was measured against. A slice of the
# weight gradient is one product over all the rows of a tile, and each product onto the gradient of
# hidden costs an addition, hence many rows and wide slices: as wide as memory of 1/8 of the logits
# allows at 2048 tokens, V 32000 and D 512.
CPU = Tiles(rows=2048, columns=2560)


class Statistics(NamedTuple):
    """Of rows over the tiles so far, fp32 [rows]; x is (logit - row_max) * scale."""

    row_max: Tensor
    """The largest logit."""
    row_sum: Tensor
    """The sum of exp(x)."""
    weighted_sum: Tensor | None
    """The sum of x exp(x), where the entropy is wanted."""
    target_logit: Tensor
    """The logit of the target, once it was met."""

    def of(self, rows: slice) -> "Statistics":
        weighted_sum = None if self.weighted_sum is None else self.weighted_sum[rows]
        return Statistics(
            self.row_max[rows], self.row_sum[rows], weighted_sum, self.target_logit[rows]
        )


class Upstream(NamedTuple):
    """What the gradient of a row's logits is made of, fp32 [rows]."""

    lse: Tensor
    dlogprob: Tensor
    dentropy: Tensor | None
    entropy: Tensor | None

    def of(self, rows: slice) -> "Upstream":
        dentropy = None if self.dentropy is None else self.dentropy[rows]
        entropy = None if self.entropy is None else self.entropy[rows]
        return Upstream(self.lse[rows], self.dlogprob[rows], dentropy, entropy)


class Kernels(Protocol):
    """What a backend brings. Logits are those of a tile that begins at column `first` of the
    vocabulary, of which targets [rows] are columns too, or negative in rows without a target."""

    def fold(
        self, logits: Tensor, targets: Tensor, first: int, scale: float, statistics: Statistics
    ) -> None:
        """Counts logits in."""

    def differentiate(
        self,
        logits: Tensor,
        dlogits: Tensor,
        targets: Tensor,
        first: int,
        scale: float,
        upstream: Upstream,
    ) -> None:
        """dlogits: the gradient of the logits, perhaps in their place."""

    def weight_gradient(self, out: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """out = dlogits.T @ hidden, contiguous, in their dtype, rounded once."""

    def add_weight_gradient(self, acc: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """acc (fp32, contiguous) += dlogits.T @ hidden."""

    def add_hidden_gradient(self, acc: Tensor, dlogits: Tensor, weight: Tensor) -> None:
        """acc (fp32, contiguous) += dlogits @ weight."""


class Stash(NamedTuple):
    """Memory of backward's that holds logits before."""

    dweight: Tensor
    """[V, D], the gradient of weight as far as it is summed"""
    tile: Tensor
    """[rows, columns] of a tile, or [0, 0] where dweight has room for all logits."""

    @staticmethod
    def empty(hidden: Tensor, weight: Tensor, size: Tiles) -> "Stash":
        tokens, dim = hidden.shape
        return Stash(
            empty_like(weight),
            _tile(hidden, weight, size) if tokens > dim else hidden.new_empty(0, 0),
        )

    def logits(self, rows: slice, part: slice, tokens: int) -> Tensor:
        """[rows, n] for the first n of the vocabulary's `part`, all of it in the first tile."""
        width = part.stop - part.start
        if rows.start == part.start == 0 and self.tile.numel() > 0:
            return self.tile[: rows.stop, :width]
        memory = self.dweight[part].view(-1)
        # As in `_tile`, each row begins on 32 bytes.
        stride = min(memory.numel() // tokens, width + 15) // 16 * 16
        return memory.as_strided((tokens, min(width, stride)), (stride, 1))[rows]


def _tile(hidden: Tensor, weight: Tensor, size: Tiles, stash: Stash | None = None) -> Tensor:
    """The stashed tile, or memory for one of [rows, columns], each row beginning on 32 bytes."""
    if stash is not None and stash.tile.numel() > 0:
        return stash.tile
    columns = min(weight.shape[0], size.columns)
    return hidden.new_empty(min(hidden.shape[0], size.rows), -(-columns // 16) * 16)


def _spans(
    part: slice, rows: slice, tokens: int, stash: Stash | None
) -> list[tuple[slice, Tensor | None]]:
    """(columns of a tile, memory with their stashed logits): those that have it, and the others."""
    stashed = None if stash is None else stash.logits(rows, part, tokens)
    first = part.start + (0 if stashed is None else stashed.shape[1])
    spans = [(slice(part.start, first), stashed), (slice(first, part.stop), None)]
    return [span for span in spans if span[0].start < span[0].stop]


def forward(
    kernels: Kernels,
    size: Tiles,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    stash: Stash | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D] -> (logprob [T] fp32, entropy [T] or [0], log-sum-exp [T]).

    stash is for a backward over tiles of the same size.
    A target that is in no tile, being at least V, has a log-probability of NaN.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.long().contiguous()
    row_max, row_sum, weighted_sum, target_logit = hidden.new_zeros(4, tokens, dtype=torch.float32)
    row_max.fill_(torch.finfo(torch.float32).min)
    target_logit.fill_(torch.nan)
    statistics = Statistics(row_max, row_sum, weighted_sum if entropy else None, target_logit)
    scale = 1 / temperature
    tile = _tile(hidden, weight, size, stash)
    # From the last tile to the first, which stays where all others were before.
    for rows in reversed(tiles(tokens, size.rows)):
        rows_hidden, rows_targets = hidden[rows], targets[rows]
        rows_statistics = statistics.of(rows)
        rows_tile = tile[: rows.stop - rows.start]
        # All views before the first product: between products they cost what its sweep through the
        # caches makes of them, a hundredth of the whole.
        spans = []
        for part in reversed(tiles(vocabulary, size.columns)):
            for columns, logits in _spans(part, rows, tokens, stash):
                if logits is None:
                    logits = rows_tile[:, : columns.stop - columns.start]
                spans.append((weight[columns].T, logits, columns.start))
        for columns_weight, logits, first in spans:
            torch.mm(rows_hidden, columns_weight, out=logits)
            kernels.fold(logits, rows_targets, first, scale, rows_statistics)
    predicted, log_sum = targets >= 0, row_sum.log()
    logprob = torch.where(predicted, (target_logit - row_max) * scale - log_sum, 0.0)
    lse = log_sum + row_max * scale
    if not entropy:
        return logprob, logprob.new_empty(0), lse
    return logprob, torch.where(predicted, log_sum - weighted_sum / row_sum, 0.0), lse


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
    stash: Stash | None = None,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight). stash as forward left it; its dweight becomes the
    latter, its tile is overwritten."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.long().contiguous()
    upstream = Upstream(
        lse.contiguous(),
        dlogprob.contiguous(),
        None if dentropy is None else dentropy.contiguous(),
        None if entropy is None else entropy.contiguous(),
    )
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    if stash is None:
        dweight = empty_like(weight)
    else:
        dweight = stash.dweight
    tile = _tile(hidden, weight, size, stash)
    one_tile = 0 < tokens <= size.rows
    for part in tiles(vocabulary, size.columns):
        part_weight = weight[part]
        # One tile of rows gives the weight gradient at once; over several it is summed in fp32.
        acc = None if one_tile else weight.new_zeros(part_weight.shape, dtype=torch.float32)
        for rows in tiles(tokens, size.rows):
            rows_hidden, rows_targets = hidden[rows], targets[rows]
            rows_upstream = upstream.of(rows)
            dlogits = tile[: rows.stop - rows.start, : part.stop - part.start]
            for columns, logits in _spans(part, rows, tokens, stash):
                first = columns.start
                out = dlogits[:, first - part.start : columns.stop - part.start]
                if logits is None:
                    logits = torch.mm(rows_hidden, weight[columns].T, out=out)
                kernels.differentiate(
                    logits, out, rows_targets, first, 1 / temperature, rows_upstream
                )
            kernels.add_hidden_gradient(dhidden[rows], dlogits, part_weight)
            if acc is None:
                kernels.weight_gradient(dweight[part], dlogits, rows_hidden)
            else:
                kernels.add_weight_gradient(acc, dlogits, rows_hidden)
        if acc is not None:
            dweight[part] = acc
    return dhidden.to(hidden.dtype), dweight
