"""Packing documents that begin alike: what neighbours share is in the batch once.

Several answers to one prompt, or the two sides of a comparison, begin with the same tokens. A
document that shares its first tokens with the one before it holds its own only, at the positions
behind them, and the batch says which rows it attends to (`model.shared_prefix`). Scores, losses and
gradients are those of whole documents but for rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from llama2rt.data.packing import Batch, Example, pack
from llama2rt.model.shared_prefix import SharedKeys

SHARED = 0.1
"""least share of a batch's tokens that is worth gathering the keys of all of them: a training step
of the quickstart's shape gains a tenth there, and nothing at half of it"""


def packing(share: bool | None) -> Callable[[Sequence[Example]], Batch]:
    """How a recipe's `share_prompts` packs: `pack_shared` (None), also for little (True), or each
    document whole (False)."""
    if share is None:
        return pack_shared
    return partial(pack_shared, least=0.0) if share else pack


def pack_shared(examples: Sequence[Example], least: float = SHARED) -> Batch:
    """`pack`, with the tokens that each example shares with the one before it left out, where those
    are at least the share `least` of all.

    Every document keeps its last token, at which scores are read, and the row that predicts its
    first trainable token: no target is shared.
    """
    shared = [0]
    for before, example in pairwise(examples):
        shared.append(min(_common(before.tokens, example.tokens), _most(example)))
    total = sum(len(example.tokens) for example in examples)
    if sum(shared) < least * total or sum(shared) == 0:
        return pack(examples)
    own = [
        Example(example.tokens[begin:], example.trainable[begin:])
        for begin, example in zip(shared, examples, strict=True)
    ]
    batch = pack(own)
    offsets = np.repeat(np.array(shared, np.int32), [len(example.tokens) for example in own])
    return replace(
        batch,
        positions=batch.positions + torch.from_numpy(offsets),
        keys=_keys(batch.cu_seqlens.tolist(), shared),
    )


def _common(before: np.ndarray, tokens: np.ndarray) -> int:
    """How many first tokens are the same."""
    n = min(len(before), len(tokens))
    different = before[:n] != tokens[:n]
    return int(different.argmax()) if different.any() else n


def _most(example: Example) -> int:
    """How many first tokens the example may leave to another."""
    trainable = example.trainable[1:]
    return int(trainable.argmax()) if trainable.any() else max(0, len(example.tokens) - 1)


def _keys(cu_seqlens: Sequence[int], shared: Sequence[int]) -> SharedKeys:
    """The keys of documents with own tokens at `cu_seqlens`, behind those that each shares."""
    rows = [np.empty(0, np.int64)]
    for begin, end, count in zip(cu_seqlens, cu_seqlens[1:], shared, strict=False):
        # The document before may itself share them with one further up.
        rows.append(np.concatenate([rows[-1][:count], np.arange(begin, end)]))
    offsets = np.cumsum([len(of_document) for of_document in rows], dtype=np.int32)
    return SharedKeys(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(offsets))
