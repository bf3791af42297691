"""From logits to tokens: each row by its own options and its own random stream.

A sample must depend on its seed, prompt index and sample index and on nothing else, so the torch
generator (one stream, consumed in batch order) is not used: a counter-based generator gives
sequence s at step t its own uniform number, and the token is read off the inverse of the
cumulative distribution. Rows that are drawn alike are drawn together, and no row depends on
another but for the last bit, in which torch's softmax may round by the number of rows. Frequency
and presence penalties and constrained decoding are left out.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2rt.errors import InputError
from llama2rt.ops import sample

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


@dataclass(frozen=True, slots=True)
class RowOptions:
    """`SamplingOptions` of B rows of logits, one array [B] for each that `choose` reads."""

    temperature: np.ndarray
    """float64"""
    top_p: np.ndarray
    """float64"""
    top_k: np.ndarray
    """int64"""
    min_p: np.ndarray
    """float64"""
    repetition_penalty: np.ndarray
    """float64"""
    logprobs: np.ndarray
    """int64"""

    @classmethod
    def empty(cls, rows: int) -> "RowOptions":
        """Rows that are drawn plainly, to be `put` or used as they are."""
        ones, zeros, none = np.ones(rows), np.zeros(rows), np.zeros(rows, np.int64)
        return cls(ones, ones.copy(), none, zeros, ones.copy(), none.copy())

    def put(self, row: int, options: Any) -> None:
        """Row `row` from what has these fields as numbers."""
        for field in fields(self):
            getattr(self, field.name)[row] = getattr(options, field.name)

    def take(self, rows: np.ndarray) -> "RowOptions":
        """The options of these rows, repeated as `rows` repeats them."""
        return RowOptions(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Choice:
    """What was drawn for B rows, on the host."""

    tokens: np.ndarray
    """int64 [B]"""
    logprobs: np.ndarray
    """fp32 [B]"""
    top: list[list[tuple[int, float]]]
    """likeliest tokens with their logprobs of each row, as many as it asks for; [] if none does"""


def choose(
    logits: Tensor, uniform: Tensor, options: RowOptions, seen: np.ndarray | None = None
) -> Choice:
    """Tokens from fp32 logits [B, V] (overwritten), whose rows float64 `uniform` [B] decides.

    The logprobs are those of the log-softmax of logits/temperature over the whole vocabulary,
    before anything else, so they equal the training path's; at temperature 0 (argmax) those of
    temperature 1. top_k 0, top_p 1 and min_p 0 mean no limit; top_p counts the probabilities
    renormalised after top_k. The top-p mask is cumulative - p > top_p, as Llama 2's: the token that
    crosses top_p stays. `seen` int64 [P, L]: for the rows with a repetition penalty, in order, the
    tokens that it is for, repeated at will.
    """
    limited = _limited_rows(options)
    if seen is None and not (limited.any() or options.logprobs.any()) and sample.usable(logits):
        temperatures = torch.from_numpy(options.temperature.astype(np.float32))
        chosen, drawn = sample.draw(logits, temperatures, uniform)
        return Choice(chosen.numpy(), drawn.numpy(), [])
    if ((options.temperature != 1) & (options.temperature != 0)).any():
        temperature = np.where(options.temperature == 0, 1, options.temperature)
        logits /= _column(temperature, logits).to(logits.dtype)
    logprobs = torch.log_softmax(logits, dim=-1)
    weights = logprobs
    if seen is not None:
        rows = _index(np.flatnonzero(options.repetition_penalty != 1), logits)
        penalty = _column(options.repetition_penalty, logits)[rows].to(logits.dtype)
        tokens = torch.from_numpy(seen).to(logits.device)
        changed = logits[rows]
        found = changed.gather(1, tokens)
        found = torch.where(found > 0, found / penalty, found * penalty)
        weights = logprobs.clone()
        weights[rows] = torch.log_softmax(changed.scatter(1, tokens, found), dim=-1)
    chosen = _draw(weights, uniform, options)
    drawn = logprobs.gather(1, chosen[:, None])[:, 0]
    return Choice(chosen.cpu().numpy(), drawn.cpu().numpy(), _top(logprobs, options.logprobs))


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)[:, None]


def _top(logprobs: Tensor, wanted: np.ndarray) -> list[list[tuple[int, float]]]:
    most = min(int(wanted.max(initial=0)), logprobs.shape[1])
    if not most:
        return []
    rows = np.flatnonzero(wanted)
    values, tokens = logprobs[_index(rows, logprobs)].topk(most, dim=-1)
    top: list[list[tuple[int, float]]] = [[] for _ in wanted]
    for row, ids, each in zip(rows.tolist(), tokens.tolist(), values.tolist(), strict=True):
        top[row] = list(zip(ids, each, strict=True))[: wanted[row]]
    return top


_ARGMAX, _PLAIN = -2, -1  # how a row is drawn; from 0 on: with this top_k and other limits


def _limited_rows(options: RowOptions) -> np.ndarray:
    """bool [B]: which rows a limit may cut, unless they are argmax's."""
    return (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)


def _draw(weights: Tensor, uniform: Tensor, options: RowOptions) -> Tensor:
    way = np.where(_limited_rows(options), options.top_k, _PLAIN)
    way[options.temperature == 0] = _ARGMAX
    if (way == way[:1]).all():  # the usual call: no copies of rows
        return _draw_alike(weights, uniform, options, int(way[0]) if len(way) else _PLAIN)
    tokens = torch.empty(len(way), dtype=torch.int64, device=weights.device)
    for each in np.unique(way).tolist():
        rows = np.flatnonzero(way == each)
        index = _index(rows, weights)
        tokens[index] = _draw_alike(weights[index], uniform[index], options.take(rows), each)
    return tokens


def _draw_alike(weights: Tensor, uniform: Tensor, options: RowOptions, way: int) -> Tensor:
    if way == _ARGMAX:
        return weights.argmax(dim=-1)
    if way == _PLAIN:
        return _invert(weights.exp().cumsum(dim=-1, dtype=torch.float64), uniform)
    # Without a limit nothing is cut, whatever a sum of rounded probabilities exceeds 1 by.
    top_p = np.where(options.top_p == 1, np.inf, options.top_p)
    min_p = _column(options.min_p, weights) if options.min_p.any() else None
    return _limited(weights.exp(), uniform, _column(top_p, weights), min_p, way)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative weight [B, N] (not normalised) exceeds uniform * total; the
    last one where that is nan, which the caller sees by its logprob."""
    threshold = uniform[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return found.clamp(max=cumulative.shape[1] - 1)


def _limited(
    probabilities: Tensor,
    uniform: Tensor,
    top_p: Tensor,
    min_p: Tensor | None,
    top_k: int,
    full: bool = False,
) -> Tensor:
    """`top_p` and `min_p` [B, 1]."""
    vocabulary = probabilities.shape[1]
    width = min(top_k or (vocabulary if full else _NUCLEUS_WIDTH), vocabulary)
    values, candidates = probabilities.topk(width, dim=-1)
    values = values.double()
    if top_k:
        values /= values.sum(dim=-1, keepdim=True)
    cumulative = values.cumsum(dim=-1)
    dropped = cumulative - values > top_p
    if min_p is not None:
        dropped |= values < min_p * values[:, :1]
    kept = torch.where(dropped, 0.0, values).cumsum(dim=-1)
    tokens = candidates.gather(1, _invert(kept, uniform)[:, None])[:, 0]
    if not top_k and width < vocabulary:
        more = cumulative[:, -1:] <= top_p
        if min_p is not None:
            more &= values[:, -1:] >= min_p * values[:, :1]
        open_rows = more[:, 0].nonzero()[:, 0]
        if len(open_rows):
            wide = probabilities[open_rows]
            limits = top_p[open_rows], None if min_p is None else min_p[open_rows]
            tokens[open_rows] = _limited(wide, uniform[open_rows], *limits, 0, full=True)
    return tokens
