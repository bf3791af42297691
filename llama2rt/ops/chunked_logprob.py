"""token_logprob as a loop over tiles of logits: torch's products, a native kernel's softmax.

Forward forms the logits in strips and folds each into the running statistics of its rows. Backward
needs every logit again, and making it again is a fourth product beside the three that the
mathematics asks for. Keeping the logits would cost the memory this op exists to save, with one
exception: the gradient of `weight`, V x D elements, has to exist in the end. Forward with
`parked` allocates it at once and leaves in each slice of it as many of the slice's own logits as
fit, D of T columns; backward takes them out just before it writes the slice. So a share
min(D / T, 1) of the fourth product is saved: all of it for up to D tokens.

A backend supplies the two passes over one tile, and its tile sizes. fp32 sums throughout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2rt.ops.composed import tiles


@dataclass(frozen=True)
class Tiling:
    """Sizes of a tile; each backend says what its own were measured against."""

    rows: int
    columns: int
    """Of a gradient tile: one product for a slice of the weight gradient, and one onto hidden's."""
    strip: int
    """Columns of logits that are made and passed over at a time: they should stay in a cache."""


Fold = Callable[[Tensor, slice, int], None]
"""fold(logits, rows, first): take a tile, columns `first` on, into the statistics of its rows."""
Differentiate = Callable[[Tensor, Tensor, slice, int], None]
"""differentiate(logits, dlogits, rows, first): the gradients of a tile, perhaps in its place."""
AddProduct = Callable[[Tensor, Tensor, Tensor], None]
"""add_product(total, a, b): total, fp32 and contiguous, += a @ b."""


def parked_logits(parked: Tensor | None, part: slice, tokens: int) -> Tensor | None:
    """[tokens, n] of the first n of the vocabulary's `part`, in that slice of parked [V, D]."""
    if parked is None:
        return None
    memory = parked[part].view(-1)
    columns = min(part.stop - part.start, memory.numel() // max(tokens, 1))
    if columns < part.stop - part.start:
        columns -= columns % 64  # rows of whole cache lines
    return memory[: tokens * columns].view(tokens, columns)


def _strips(width: int, kept: int, step: int) -> Iterator[tuple[slice, bool]]:
    """(columns of a tile, whether they are among its `kept` parked ones), in order."""
    for strip in tiles(kept, step):
        yield strip, True
    for strip in tiles(width - kept, step):
        yield slice(kept + strip.start, kept + strip.stop), False


def forward(
    hidden: Tensor, weight: Tensor, parked: Tensor | None, tiling: Tiling, fold: Fold
) -> None:
    """Every logit of hidden [T, D] @ weight.T [D, V] passes `fold` once; some stay in `parked`."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    buffer = hidden.new_empty(min(tokens, tiling.rows), min(vocabulary, tiling.strip))
    for part in tiles(vocabulary, tiling.columns):
        kept = parked_logits(parked, part, tokens)
        width, columns = part.stop - part.start, 0 if kept is None else kept.shape[1]
        for rows in tiles(tokens, tiling.rows):
            for strip, park in _strips(width, columns, tiling.strip):
                logits = buffer[: rows.stop - rows.start, : strip.stop - strip.start]
                if kept is not None and park:
                    logits = kept[rows, strip]
                torch.mm(hidden[rows], weight[part][strip].T, out=logits)
                fold(logits, rows, part.start + strip.start)


def backward(
    hidden: Tensor,
    weight: Tensor,
    parked: Tensor | None,
    tiling: Tiling,
    differentiate: Differentiate,
    add_product: AddProduct,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight); `parked`, if any, becomes the latter."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    if parked is None:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    else:
        dweight = parked
    one_tile = 0 < tokens <= tiling.rows
    buffer = hidden.new_empty(min(tokens, tiling.rows), min(vocabulary, tiling.columns))
    for part in tiles(vocabulary, tiling.columns):
        slice_of_weight = weight[part]
        kept = parked_logits(parked, part, tokens)
        width, columns = part.stop - part.start, 0 if kept is None else kept.shape[1]
        # One tile of rows gives the weight gradient at once; over several it is summed in fp32.
        accumulated = (
            None if one_tile else weight.new_zeros(slice_of_weight.shape, dtype=torch.float32)
        )
        for rows in tiles(tokens, tiling.rows):
            dlogits = buffer[: rows.stop - rows.start, :width]
            for strip, park in _strips(width, columns, tiling.strip):
                logits = dlogits[:, strip]
                if kept is not None and park:
                    logits = kept[rows, strip]
                else:
                    torch.mm(hidden[rows], slice_of_weight[strip].T, out=logits)
                differentiate(logits, dlogits[:, strip], rows, part.start + strip.start)
            add_product(dhidden[rows], dlogits, slice_of_weight)
            # From here on the slice of the gradient no longer holds logits (of any row).
            if accumulated is None:
                torch.mm(dlogits.T, hidden[rows], out=dweight[part])
            else:
                add_product(accumulated, dlogits.T, hidden[rows])
        if accumulated is not None:
            dweight[part] = accumulated
    return dhidden.to(hidden.dtype), dweight
