"""How much attention later turns still pay to the first turn's instruction (Figure 9)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama2rt.model import Llama
from llama2rt.model.attention_map import attention_map
from llama2rt.parallel import gather
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


def of_dialogue(
    model: Llama, tokenizer: Tokenizer, messages: Messages, plain: Messages, bins: int = 48
) -> dict[str, Any]:
    """Of a finished dialogue whose first turn holds an instruction, and the same without it:
    `tokens`, `instruction` [begin, end) in tokens, `bins` (see `AttentionMap`), and `turns`: the
    largest weight, over layers and heads, from a token of that turn's answer to the instruction,
    mean over the answer. All ranks take part, and have it."""
    tokens, answered = chat.encode_dialogue(tokenizer, messages)
    without, _ = chat.encode_dialogue(tokenizer, plain)
    begin = _alike(tokens, without)
    end = max(begin + 1, len(tokens) - _alike(tokens[::-1], without[::-1]))
    found = attention_map(model, tokens, slice(begin, end), bins)
    # Ranks of a tensor group have some of the heads each; others have all of them.
    everywhere = gather((found.bins.numpy(), found.to_span.numpy()))
    largest, to_span = (np.max(parts, axis=0) for parts in zip(*everywhere, strict=True))
    return {
        "tokens": len(tokens),
        "instruction": [begin, end],
        "bins": np.round(largest.astype(float), 4).tolist(),
        "turns": [round(float(to_span[turn].mean()), 4) for turn in _runs(answered)],
    }


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _runs(mask: Sequence[bool]) -> list[slice]:
    """Where `mask` is True without interruption: the answers of a dialogue."""
    runs, position = [], 0
    for on, group in itertools.groupby(mask):
        length = len(list(group))
        if on:
            runs.append(slice(position, position + length))
        position += length
    return runs
