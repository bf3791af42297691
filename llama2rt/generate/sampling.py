"""From logits to tokens: temperature, top-k, top-p, and each sequence's own random stream.

A sample must depend on its seed, prompt index and sample index and on nothing else, so the torch
generator (one stream, consumed in batch order) is not used: a counter-based generator gives
sequence s at step t its own uniform number, and the token is read off the inverse of the
cumulative distribution. Penalties, stop strings and constrained decoding are left out.
"""

import math

import numpy as np
import torch
from torch import Tensor

from llama2rt.errors import InputError

# SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
# Its state only adds the increment, so number t of stream `key` is mix(key + (t + 1) * increment).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)

# Sorting 32000 probabilities costs seven times as much as finding the largest 128, which hold the
# nucleus of nearly every position of a trained model; rows where they do not are sorted in full.
_NUCLEUS_WIDTH = 128


# Counts are int32 on the host and on the device.
MOST = 2**31 - 1


def check_whole(name: str, value: object, least: int, most: int = MOST) -> None:
    """InputError naming the argument unless `value` is an integer in least..most."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= most:  # type: ignore[operator]
        raise InputError(f"{name}: expected an integer in {least}..{most}, got {value!r}")


def check_options(
    n: int, temperature: float, top_p: float, top_k: int, max_tokens: int, seed: int
) -> None:
    """InputError naming the first of `Engine.generate`'s options that means nothing."""
    check_whole("n", n, 1)
    check_whole("top_k", top_k, 0)
    check_whole("max_tokens", max_tokens, 1)
    check_whole("seed", seed, 0, 2**63 - 1)
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature: expected a finite number, at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: expected a number in (0, 1], got {top_p}")


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> _SHIFTS[0])) * _MULTIPLIERS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return state ^ (state >> _SHIFTS[2])


def stream_keys(seed: int, prompts: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """uint64 [B]: the random stream of each (seed, prompt index, sample index)."""
    key = np.full(len(prompts), seed % 2**64, dtype=np.uint64)
    for index in (prompts, samples):
        key = _mix(key + _INCREMENT) + index.astype(np.uint64) * _INCREMENT
    return _mix(key + _INCREMENT)


def uniforms(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float64 [B] in (0, 1): number `steps[i]` of stream `keys[i]`; 48 bits, never 0 or 1."""
    bits = _mix(keys + (steps.astype(np.uint64) + np.uint64(1)) * _INCREMENT) >> np.uint64(16)
    return (bits.astype(np.float64) + 0.5) * 2.0**-48


def choose(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] and their logprobs fp32 [B] from fp32 logits [B, V] (overwritten).

    `uniform` float64 [B] decides each row. The logprob is that of the log-softmax of
    logits/temperature over the whole vocabulary, before top-k and top-p, so it equals the training
    path's; at temperature 0 (argmax) that of temperature 1. top_k 0 and top_p 1 mean no limit;
    with both, top_p counts the probabilities renormalised after top_k. The top-p mask is
    cumulative - p > top_p, as Llama 2's: the token that crosses top_p stays.
    """
    if temperature not in (0.0, 1.0):
        logits /= temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(dim=-1)
    elif top_k or top_p < 1:
        tokens = _restricted(logprobs.exp(), uniform, top_p, top_k)
    else:
        tokens = _invert(logprobs.exp().cumsum(dim=-1, dtype=torch.float64), uniform)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative weight [B, N] (not normalised) exceeds uniform * total; the
    last one where that is nan, which the caller sees by its logprob."""
    threshold = uniform[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return found.clamp(max=cumulative.shape[1] - 1)


def _restricted(
    probabilities: Tensor, uniform: Tensor, top_p: float, top_k: int, full: bool = False
) -> Tensor:
    vocabulary = probabilities.shape[1]
    width = min(top_k or (vocabulary if full else _NUCLEUS_WIDTH), vocabulary)
    values, candidates = probabilities.topk(width, dim=-1)
    values = values.double()
    if top_k:
        values /= values.sum(dim=-1, keepdim=True)
    cumulative = values.cumsum(dim=-1)
    kept = torch.where(cumulative - values > top_p, 0.0, values).cumsum(dim=-1)
    tokens = candidates.gather(1, _invert(kept, uniform)[:, None])[:, 0]
    if not top_k and width < vocabulary:
        open_rows = (cumulative[:, -1] <= top_p).nonzero()[:, 0]
        if len(open_rows):
            tokens[open_rows] = _restricted(
                probabilities[open_rows], uniform[open_rows], top_p, 0, full=True
            )
    return tokens
