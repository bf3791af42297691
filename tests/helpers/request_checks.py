"""Answers of `random_requests`, which ran together, against what each request gets alone.

`compare` asks for each answer again, alone; `verify` checks every token against a forward pass of
its own, from which it may differ only at a tie: two tokens have logits within 1e-4, or the uniform
number is within 1e-4 of the border between them, or what top-p or min-p keeps is decided by so
little.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from random_requests import Asked, fresh
from small_models import packed
from torch import Tensor

from llama2rt.generate import Engine
from llama2rt.generate.kv_cache import Addresses, KVCache
from llama2rt.generate.sampling import RowOptions, choose, stream_keys, uniforms

TIE = 1e-4


@dataclass(frozen=True)
class Parted:
    """An answer that is not the one that its request gets alone."""

    request: int
    what: str
    greedy: bool
    token: int | None = None
    """number of the first that differs; None where it is text or length that does"""
    gap: float | None = None
    """between the two largest logits there, after the repetition penalty"""
    border: float | None = None
    """of a sampled one: the power of ten within which the uniform number is of a border between the
    two tokens; None where it is more than 1e-4"""

    @property
    def tie(self) -> bool:
        """Whether rounding may have chosen."""
        return self.greedy and self.gap is not None and self.gap < TIE


def compare(engine: Engine, asked: list[Asked]) -> tuple[dict, list[Parted]]:
    """Each request alone, without any cached prefix: how many whole answers and beginnings of
    aborted ones are equal, the largest difference of their log-probabilities, and those that
    differ."""
    found = {"equal": 0, "aborted_and_equal": 0, "logprobs_apart": 0.0}
    parted = []
    with engine.session() as session:
        for number, one in enumerate(asked):
            alone = fresh(one)
            session.reset()
            session.add(alone.prompt, alone.options, sample=alone.sample)
            while session.unfinished:
                for update in session.step():
                    alone.take(update)
            if (other := _parted(engine, number, one, alone)) is not None:
                parted.append(other)
                continue
            common = len(one.tokens)
            apart = np.abs(np.array(one.logprobs) - alone.logprobs[:common]).max(initial=0)
            found["logprobs_apart"] = max(found["logprobs_apart"], float(apart))
            found["aborted_and_equal" if one.finish_reason == "abort" else "equal"] += 1
    return found, parted


def _parted(engine: Engine, number: int, one: Asked, alone: Asked) -> Parted | None:
    greedy = one.options.temperature == 0
    for i, pair in enumerate(zip(one.tokens, alone.tokens, strict=False)):
        if pair[0] != pair[1]:
            what = f"{pair[0]}, alone {pair[1]}"
            border = None if greedy else _border(engine, one, i, pair)
            return Parted(number, what, greedy, i, _gap(engine, one, i), border)
    if one.finish_reason == "abort":
        right = len(one.tokens) <= len(alone.tokens) and _begins(one, alone.text)
    else:
        right = (one.tokens, one.text, one.finish_reason) == (
            alone.tokens,
            alone.text,
            alone.finish_reason,
        )
    return None if right else Parted(number, f"{one}, alone {alone}", greedy)


def _begins(aborted: Asked, text: str) -> bool:
    """Whether `text` begins as the aborted answer's. That may end in what was held back: part of a
    character, or the beginning of a stop text, which the whole answer does not hold."""
    shown = aborted.text.rstrip("\N{REPLACEMENT CHARACTER}")
    if text.startswith(shown):
        return True
    rest = shown[len(text) :]
    return shown.startswith(text) and any(stop.startswith(rest) for stop in aborted.options.stop)


@torch.inference_mode()
def _logits(engine: Engine, context: list[int]) -> Tensor:
    """fp32 [tokens, V] from one forward pass over all, on the weights that the engine runs on."""
    length = len(context)
    every = torch.arange(length)
    cache = KVCache(engine.model.config.layers, 1, length)
    cache.addresses = Addresses(
        slots=every,
        prompt_cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        prompt_tokens=length,
        longest_prompt=length,
        block_table=torch.empty(0, 0, dtype=torch.int32),
        lengths=torch.empty(0, dtype=torch.int32),
        cu_seqlens_q=None,
    )
    return engine.runner.forward(torch.tensor(context), every, cache, slice(None)).clone()


def _penalised(row: Tensor, held: list[int], penalty: float) -> Tensor:
    row = row.clone()
    row[held] = torch.where(row[held] > 0, row[held] / penalty, row[held] * penalty)
    return row


def _gap(engine: Engine, one: Asked, token: int) -> float:
    held = one.prompt + one.tokens[:token].tolist()
    row = _penalised(_logits(engine, held)[-1], held, one.options.repetition_penalty)
    first, second = row.topk(2).values.tolist()
    return first - second


@torch.no_grad()
def _border(engine: Engine, one: Asked, token: int, pair: tuple[int, int]) -> float | None:
    prefix = replace(one, tokens=one.tokens[: token + 1])
    draw = Draws(prefix, _logits(engine, one.prompt + prefix.tokens.tolist()))
    for power in range(-9, -3):
        by = 10.0**power
        if set(pair) <= {int(draw.tokens(each)[-1]) for each in (-by, 0, by)}:
            return by
    return None


class Draws:
    """What a request draws at each of its tokens from the logits [prompt + tokens, V] of its
    answer."""

    def __init__(self, one: Asked, logits: Tensor) -> None:
        n, prompt = len(one.tokens), len(one.prompt)
        context = one.prompt + one.tokens.tolist()
        self.logits = logits[prompt - 1 : -1]
        self.options = RowOptions.empty(1)
        self.options.put(0, one.options)
        key = stream_keys(one.options.seed, np.zeros(1, np.int64), np.array([one.sample]))
        self.uniform = torch.from_numpy(uniforms(key.repeat(n), np.arange(n)))
        self.seen = None
        if one.options.repetition_penalty != 1:
            self.seen = np.array(
                [(context[: prompt + i] + context[:1] * n)[: prompt + n] for i in range(n)]
            )

    def tokens(self, uniform_by: float = 0, top_p_by: float = 0, min_p_by: float = 0) -> np.ndarray:
        """int64 [tokens]; the uniform numbers, top-p and min-p changed by so much."""
        rows = self.options.take(np.zeros(len(self.logits), np.int64))
        rows.top_p[rows.top_p < 1] += top_p_by
        rows.min_p[:] *= 1 + min_p_by
        near = (self.uniform + uniform_by).clamp(0, 1)
        return choose(self.logits.clone(), near, rows, self.seen).tokens


@torch.no_grad()
def verify(engine: Engine, asked: list[Asked]) -> dict:
    """Each answer token by token: that it is what the request draws from the logits of one forward
    pass over prompt and answer, as training computes them (with int8 weights, the engine's own),
    and that it ends where it must. By induction it is then the answer that the request gets
    alone."""
    found = {"drawn": 0, "ties": 0}
    for one in asked:
        ties = _drawn(engine, one)
        found["drawn"] += len(one.tokens) - ties
        found["ties"] += ties
        _require_end(engine, one)
    return found


def _drawn(engine: Engine, one: Asked) -> int:
    """How many tokens are chosen by less than TIE; AssertionError where one is not chosen."""
    n, prompt = len(one.tokens), len(one.prompt)
    if not n:
        return 0
    context = one.prompt + one.tokens.tolist()
    if engine.runner.weights == "int8":
        logits = _logits(engine, context)
    else:
        logits = engine.model.logits(*packed(context)).float()
    draws = Draws(one, logits)
    logits, answer, expected = draws.logits, np.array(one.tokens), draws.tokens()
    np.testing.assert_allclose(one.logprobs, _logprobs(logits, one), atol=1e-4)
    right = expected == answer
    if right.all():
        return 0
    near = itertools.product((-TIE, 0, TIE), repeat=3)
    others = [draws.tokens(*each) for each in near]
    options = draws.options
    for i in np.flatnonzero(~right).tolist():
        row = _penalised(logits[i], context[: prompt + i], one.options.repetition_penalty)
        # Two tokens as likely as each other: argmax, and the order of those to draw from.
        gap = abs(float(row[expected[i]] - row[answer[i]]))
        # Between two borders that near there may be tokens of which neither draw knows.
        limited = bool((options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0))
        order = row.argsort(descending=True).argsort() if limited else torch.arange(len(row))
        places = [int(order[tokens[i]]) for tokens in others]
        between = min(places) <= int(order[answer[i]]) <= max(places)
        assert between or gap < TIE, f"{one}: {expected[i]} at {i}, by {gap}"
    return int((~right).sum())


def _logprobs(logits: Tensor, one: Asked) -> np.ndarray:
    scaled = logits / (one.options.temperature or 1)
    return scaled.log_softmax(-1)[range(len(one.tokens)), one.tokens.tolist()].numpy()


def _require_end(engine: Engine, one: Asked) -> None:
    decode, stop_ids = engine.tokenizer.decode, engine.tokenizer.stop_ids + one.options.stop_ids
    limit = min(one.options.max_tokens, engine.model.config.context - len(one.prompt))
    assert not set(one.tokens[:-1]) & set(stop_ids), f"{one}: goes on after a stop token"
    by_id = bool(one.tokens) and one.tokens[-1] in stop_ids
    before = decode(one.prompt)
    whole = decode(one.prompt + one.tokens[: len(one.tokens) - by_id].tolist())
    if not whole.startswith(before):
        return  # the prompt ends within a character
    whole = whole[len(before) :]
    found = [whole.index(stop) for stop in one.options.stop if stop in whole]
    if found and one.finish_reason != "abort":
        assert (one.finish_reason, one.text) == ("stop", whole[: min(found)]), f"{one}: {whole}"
    elif one.finish_reason == "abort":
        assert whole.startswith(one.text), f"{one}: {whole}"
    else:
        reason = "stop" if by_id else "length"
        assert by_id or len(one.tokens) == limit, f"{one}: ended early"
        assert (one.finish_reason, one.text) == (reason, whole), f"{one}: {whole}"
