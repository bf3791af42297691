"""Sequences that wait and sequences that run: the scheduler's arrays, on the host."""

from dataclasses import dataclass, field

import numpy as np

from llama2rt.generate.request import Request
from llama2rt.generate.sampling import RowOptions


@dataclass(slots=True, eq=False)
class Sequence:
    """One request: waiting, running, or finished with what it generated."""

    request: Request
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """generated, when it does not run"""
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """of all tokens generated, where the request asks for them"""
    finish_reason: str | None = None
    chain: list[bytes] | None = None
    """of what is to be computed, once it has come to the queue's front (`PrefixCache.chain`)"""

    @property
    def context(self) -> np.ndarray:
        """int32: the prompt and what was generated."""
        return np.concatenate([self.request.prompt, self.tokens])

    @property
    def with_text(self) -> np.ndarray:
        """int32: what was generated, without the token that ended it."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


class Slots:
    """What runs, one row each: at most `count` sequences of at most `length` tokens."""

    def __init__(self, count: int, length: int, page_size: int) -> None:
        self.page_size = page_size
        self.sequences: list[Sequence | None] = [None] * count
        self.free = list(range(count))[::-1]
        self.keys = np.zeros(count, np.uint64)
        self.prompts = np.zeros(count, np.int32)  # prompt tokens
        self.limits = np.zeros(count, np.int32)
        self.counts = np.zeros(count, np.int32)  # tokens generated
        self.cached = np.zeros(count, np.int32)  # tokens whose keys and values are in pages
        self.held = np.zeros(count, np.int32)  # pages
        self.pages = np.zeros((count, -(-length // page_size)), np.int32)
        # Both touch memory only as far as sequences reach.
        self.tokens = np.zeros((count, length), np.int32)  # prompt, answer, guesses
        self.logprobs = np.zeros((count, length), np.float32)  # of the answer
        self.stop_ids = np.full((count, 1), -1, np.int64)
        self.options = RowOptions.empty(count)

    def enter(self, sequence: Sequence, context: np.ndarray, pages: np.ndarray, cached: int) -> int:
        """The slot in which `sequence` runs from now on; `pages` hold `cached` tokens of its
        context, or will after the next forward pass."""
        slot, request = self.free.pop(), sequence.request
        generated = len(sequence.tokens)
        self.sequences[slot] = sequence
        self.keys[slot] = request.key
        self.prompts[slot] = len(request.prompt)
        self.limits[slot] = request.limit
        self.counts[slot] = generated
        self.cached[slot] = cached
        self.held[slot] = len(pages)
        self.pages[slot, : len(pages)] = pages
        self.tokens[slot, : len(context)] = context
        self.logprobs[slot, :generated] = sequence.logprobs
        more = len(request.stop_ids) - self.stop_ids.shape[1]
        if more > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, more)), constant_values=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        self.options.put(slot, request.options)
        return slot

    def leave(self, slot: int) -> Sequence:
        """Frees the slot; the sequence takes its tokens with it. The pages are the caller's."""
        sequence = self.sequences[slot]
        assert sequence is not None
        count, prompt = self.counts[slot], self.prompts[slot]
        sequence.tokens = self.tokens[slot, prompt : prompt + count].copy()
        sequence.logprobs = self.logprobs[slot, :count].copy()
        sequence.chain = None
        self.sequences[slot] = None
        self.free.append(slot)
        return sequence

    def answer(self, slot: int, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that the sequence in `slot` generated from number `begin` on, and logprobs."""
        count, prompt = self.counts[slot], self.prompts[slot]
        tokens = self.tokens[slot, prompt + begin : prompt + count]
        return tokens, self.logprobs[slot, begin:count]

    def append(
        self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, taken: np.ndarray
    ) -> None:
        """Gives each of `rows` [B] the first `taken` [B] of its new tokens [B, K]."""
        counts = self.counts[rows]
        for j in range(int(taken.max(initial=0))):
            some = taken > j
            at, index = rows[some], counts[some] + j
            self.tokens[at, self.prompts[at] + index] = tokens[some, j]
            self.logprobs[at, index] = logprobs[some, j]
        self.counts[rows] += taken
        self.cached[rows] += taken
