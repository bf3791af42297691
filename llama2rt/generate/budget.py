"""What one call of the engine may hold at once, worked out from `cache_bytes` before it begins.

`cache_bytes` bounds all that a call takes beside the model: keys and values, and the activations
and logits of a forward pass. So a forward pass is kept to a quarter of it where that suffices:
fewer prompt tokens are prefilled together, fewer sequences decode together; the rest is pages.
Left out: what the libraries below take for themselves beyond copies of a weight (thread stacks).
"""

from dataclasses import dataclass

import numpy as np
import torch

from llama2rt.errors import InputError
from llama2rt.generate.kv_cache import page_bytes, sequence_bytes
from llama2rt.model.config import LlamaConfig
from llama2rt.model.llama import Llama

# Beyond about this many prompt tokens in one step a larger GEMM is not more efficient.
PREFILL_TOKENS = 4096
# In a session others wait for each step: a long prompt is computed in chunks of so many tokens.
CHUNK_TOKENS = 512
_FORWARD_SHARE = 4
# What an allocator takes for tensors that come and go, against what is alive at once: glibc's heap
# took 2.0 to 2.8 times as much (134M shape, one and two threads, benchmarks/generation).
_ALLOCATOR = 3.25
# Bytes a logit: itself, its log-probability, its probability (fp32) and the running sum (fp64);
# with top-k or top-p in the worst case, where a row is sorted in full, a dozen more vectors.
_LOGIT_BYTES, _SORTED_LOGIT_BYTES = 20, 64


def least_bytes(config: LlamaConfig, dtype: torch.dtype, tokens: int, tensor: int = 1) -> int:
    """The smallest `cache_bytes` in which one sequence of `tokens` can be sampled, before there is
    a model, without top-k or top-p and in pages of the usual size. `tensor`: ranks that share the
    heads."""
    pages = sequence_bytes(config, dtype, tokens) // tensor
    return pages + forward_bytes(config, dtype, tokens, 1, restricted=False)


@dataclass(frozen=True)
class Bounds:
    """What a call may take, and what makes it take more."""

    allowed: int
    """bytes beside the model"""
    page_size: int
    """tokens"""
    sequences: int
    """at once"""
    speculate: int
    """guesses behind each decoded token, at most"""
    restricted: bool
    """whether rows of logits are sorted, or copied: by top-k, top-p and the like"""


@dataclass(frozen=True)
class Budget:
    """`pages` of keys and values; most prompt tokens prefilled and most sequences in one step."""

    pages: int
    prefill_tokens: int
    sequences: int


def forward_bytes(
    config: LlamaConfig, dtype: torch.dtype, prefill_tokens: int, sequences: int, restricted: bool
) -> int:
    """Bytes of one forward pass without gradients over so many prompt tokens and decoding
    sequences: its widest moment in a block, or at the logits. `restricted`: by top-k or top-p."""
    # In a block: residual, norm, gate, up, product and what comes down; or queries, keys and
    # values before and after rotation, the residual and the attention's result.
    widest = max(4 * config.dim + 3 * config.ffn_hidden, 9 * config.dim)
    logit = dtype.itemsize + (_SORTED_LOGIT_BYTES if restricted else _LOGIT_BYTES)
    alive = max(
        (prefill_tokens + sequences) * widest * dtype.itemsize,
        sequences * config.vocab_size * logit,
    )
    # What products take beside their results: packed panels of a weight, for two threads.
    packed = 2 * config.dim * config.ffn_hidden * dtype.itemsize
    return int(alive * _ALLOCATOR) + packed


def _forward(model: Llama, bounds: Bounds, prefill: int, sequences: int) -> int:
    rows = sequences * (bounds.speculate + 1)
    dtype = model.output.weight.dtype
    return forward_bytes(model.config, dtype, prefill, rows, restricted=bounds.restricted)


def plan(model: Llama, lengths: np.ndarray, limits: np.ndarray, n: int, bounds: Bounds) -> Budget:
    """The budget of `n` samples of prompts of `lengths` [P] tokens, each with up to `limits` [P]
    more. InputError naming the prompt that fits in no budget."""
    if len(lengths) == 0:
        return Budget(0, PREFILL_TOKENS, bounds.sequences)
    totals = (lengths + limits).astype(np.int64)
    needed = -(-totals // bounds.page_size)
    longest, most = int(totals.argmax()), int(totals.max())
    page = page_bytes(model, bounds.page_size)
    always, token, row = _costs(model, bounds)

    def within(share: int) -> Budget:
        left = max(0, share - always)
        sequences = min(bounds.sequences, len(lengths) * n, max(1, left // row))
        prefill = max(most, min(PREFILL_TOKENS, left // token - sequences))
        # All that may run at once, each as long as it may get, and one prompt held for its samples.
        at_once = np.sort(needed.repeat(n))[-sequences:]
        room = (bounds.allowed - _forward(model, bounds, prefill, sequences)) // page
        return Budget(min(int(at_once.sum() + needed[longest]), room), prefill, sequences)

    chosen = within(bounds.allowed // _FORWARD_SHARE)
    if chosen.pages < needed[longest]:
        chosen = within(0)
    if chosen.pages < needed[longest]:
        least = int(needed[longest]) * page + _forward(model, bounds, most, 1)
        raise InputError(
            f"cache_bytes: expected at least {least} for prompt {longest} ({lengths[longest]} "
            f"tokens and up to {limits[longest]} more), got {bounds.allowed}"
        )
    return chosen


def plan_session(model: Llama, bounds: Bounds) -> Budget:
    """The budget of requests that are not known yet: at most what all sequences can fill.
    InputError where not even a page is left."""
    page = page_bytes(model, bounds.page_size)
    always, token, row = _costs(model, bounds)
    longest = -(-model.config.context // bounds.page_size)
    for share in (bounds.allowed // _FORWARD_SHARE, 0):
        left = max(0, share - always)
        sequences = min(bounds.sequences, max(1, left // row))
        prefill = min(CHUNK_TOKENS, max(bounds.page_size, left // token - sequences))
        forward = _forward(model, bounds, prefill, sequences)
        pages = min((bounds.allowed - forward) // page, sequences * longest)
        if pages > 0:
            return Budget(pages, prefill, sequences)
    raise InputError(
        f"cache_bytes: expected at least {forward + page} for a page, got {bounds.allowed}"
    )


def _costs(model: Llama, bounds: Bounds) -> tuple[int, int, int]:
    """Bytes of a forward pass over nothing, of a prompt token and of a decoding sequence."""
    always = _forward(model, bounds, 0, 0)
    token, row = (_forward(model, bounds, *each) - always for each in ((1, 0), (0, 1)))
    return always, token, row
