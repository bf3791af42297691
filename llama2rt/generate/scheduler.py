"""Continuous batching: which sequences run in the next forward pass, and where their tokens lie.

Host only (numpy), and vectorised over sequences: per step there is no Python work per sequence,
only at its admission and its end. A step decodes one token of every live sequence and, in the same
forward pass, prefills the prompts of those that enter: up to the last token, which is the first
that each sample decodes. So every sampled token comes from a decoded row, and all samples of a
prompt start from the same pages; those that need a copy of its last, partly filled page begin one
step later. Pages are given out as sequences grow; when none is
left, the youngest sequence goes back to the queue and is prefilled again, with the tokens it had,
once there is room. Left out: priorities, chunked prefill, prefix reuse between different prompts.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from llama2rt.generate.budget import Budget
from llama2rt.generate.kv_cache import PagePool


@dataclass(slots=True)
class Sequence:
    """One sample of one prompt: waiting, or finished with what it generated."""

    prompt: int
    sample: int
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass, on the host. T = prefilled tokens + B decoding sequences.

    `tokens`, `positions`, `slots` [T]; `cu_seqlens` [prompts + 1] of the prefilled part;
    `block_table` [B, W], `lengths` [B] (the new token included), `keys` and `counts` [B] (random
    stream and the number of tokens generated so far); `copies` [2, n] pages to copy afterwards.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    cu_seqlens: np.ndarray
    block_table: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    counts: np.ndarray
    copies: np.ndarray


class Scheduler:
    """Runs n samples of each prompt (int32 arrays); `limits[i]` is prompt i's max tokens, `keys`
    uint64 [P, n] are the samples' random streams, and any of `stop_ids` ends a sample.

    `budget` bounds what runs at once: its pages of `page_size` tokens, its sequences, and the
    prompt tokens that a step prefills (or one prompt that is longer). The caller has made sure that
    any single sequence fits.
    """

    def __init__(
        self,
        prompts: list[np.ndarray],
        limits: np.ndarray,
        keys: np.ndarray,
        stop_ids: tuple[int, ...],
        budget: Budget,
        page_size: int,
    ) -> None:
        self.prefill_tokens = budget.prefill_tokens
        self.prompts, self.limits, self.stop_ids = prompts, limits, stop_ids
        self.page_size = page_size
        self.pool = PagePool(budget.pages)
        self.waiting = deque(Sequence(p, s) for p, s in np.ndindex(*keys.shape))
        self._stream_keys = keys
        self.rows = np.empty(0, np.int64)  # live slots, oldest first
        # Pages of a prefilled prompt, referenced here while the queue's front holds samples of it.
        self._shared: np.ndarray | None = None
        # Each holds a page of its own.
        slots = min(budget.sequences, len(self.waiting), budget.pages)
        longest = max((len(p) + limit for p, limit in zip(prompts, limits, strict=True)), default=0)
        width = -(-longest // page_size)
        self._free_slots = list(range(slots))[::-1]
        self._sequence: list[Sequence | None] = [None] * slots
        self._key = np.zeros(slots, np.uint64)
        self._limit = np.zeros(slots, np.int32)
        self._count = np.zeros(slots, np.int32)  # tokens generated
        self._cached = np.zeros(slots, np.int32)  # tokens in the cache
        self._last = np.zeros(slots, np.int32)  # generated (or the prompt's last), not yet cached
        self._held = np.zeros(slots, np.int32)  # pages
        self._pages = np.zeros((slots, width), np.int32)
        most = int(limits.max(initial=0))
        self._tokens = np.zeros((slots, most), np.int32)
        self._logprobs = np.zeros((slots, most), np.float32)

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or len(self.rows) > 0

    def step(self) -> Step:
        """Grows the live sequences by a page where one is full, then admits waiting ones."""
        self._grow()
        prefill, copies, ready, later = self._admit()
        rows = np.concatenate([self.rows, np.array(ready, np.int64)])
        self.rows = np.concatenate([rows, np.array(later, np.int64)])
        cached = self._cached[rows]
        width = int(cached.max(initial=-1)) // self.page_size + 1
        table = self._pages[rows, :width]
        page = table[np.arange(len(rows)), cached // self.page_size].astype(np.int64)
        sizes = np.array([0, *(len(tokens) for tokens, _ in prefill)], np.int32)
        offsets = np.arange(self.page_size)
        return Step(
            tokens=np.concatenate([*(tokens for tokens, _ in prefill), self._last[rows]]),
            positions=np.concatenate([*(np.arange(n, dtype=np.int32) for n in sizes[1:]), cached]),
            slots=np.concatenate(
                [
                    *(
                        (pages[:, None] * np.int64(self.page_size) + offsets).ravel()[: len(tokens)]
                        for tokens, pages in prefill
                    ),
                    page * self.page_size + cached % self.page_size,
                ]
            ),
            cu_seqlens=sizes.cumsum(dtype=np.int32),
            block_table=table,
            lengths=cached + 1,
            keys=self._key[rows],
            counts=self._count[rows],
            copies=np.array(copies, np.int64).reshape(-1, 2).T,
        )

    def record(self, step: Step, tokens: np.ndarray, logprobs: np.ndarray) -> list[Sequence]:
        """Takes the step's sampled tokens [B]; returns the sequences that are finished now."""
        rows = self.rows[: len(step.lengths)]
        self._tokens[rows, step.counts] = tokens
        self._logprobs[rows, step.counts] = logprobs
        self._last[rows] = tokens
        self._count[rows] += 1
        self._cached[rows] += 1
        stopped = np.isin(tokens, self.stop_ids)
        done = stopped | (self._count[rows] >= self._limit[rows])
        finished = []
        if done.any():
            for slot, stop in zip(rows[done].tolist(), stopped[done].tolist(), strict=True):
                sequence = self._leave(slot)
                sequence.finish_reason = "stop" if stop else "length"
                finished.append(sequence)
            live = np.ones(len(self.rows), bool)
            live[: len(rows)] = ~done
            self.rows = self.rows[live]
        return finished

    def _grow(self) -> None:
        while True:
            rows = self.rows
            full = rows[self._cached[rows] // self.page_size >= self._held[rows]]
            if len(full) <= self.pool.free:
                break
            if self._shared is not None:
                self.pool.release(self._shared)  # prefilled again when its samples enter
                self._shared = None
            else:
                self.waiting.appendleft(self._leave(int(rows[-1])))
                self.rows = rows[:-1]
        self._pages[full, self._held[full]] = self.pool.take(len(full))
        self._held[full] += 1

    def _admit(
        self,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[int, int]], list[int], list[int]]:
        """(tokens, pages) of each prompt to prefill, (source, target) pages to copy after the
        forward pass, slots that decode in it and slots that decode from the next one on."""
        prefill: list[tuple[np.ndarray, np.ndarray]] = []
        copies: list[tuple[int, int]] = []
        ready: list[int] = []
        later: list[int] = []
        prefilled = 0
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            tokens = np.concatenate([self.prompts[sequence.prompt], sequence.tokens])
            cached = len(tokens) - 1
            full, tail = divmod(cached, self.page_size)
            if self._shared is None:
                if prefilled and prefilled + cached > self.prefill_tokens:
                    break
                if not self._room(full + 1, ready + later):
                    break
                pages = self.pool.take(full + 1)
                if cached:
                    prefill.append((tokens[:-1], pages))
                    prefilled += cached
                if self._sibling_follows():
                    self._shared = pages
            entering = ready
            if self._shared is not None:
                pages = self._shared
                room = self._room(1, ready + later)
                alone = not (len(self.rows) or ready or later)
                if not self._sibling_follows() or (alone and not room):
                    self._shared = None  # its own reference passes to this sequence
                elif not room:
                    break
                else:
                    self.pool.share(pages[:full])
                    pages = np.append(pages[:full], self.pool.take(1))
                    if tail:
                        copies.append((int(self._shared[full]), int(pages[full])))
                        entering = later
            self.waiting.popleft()
            entering.append(self._enter(sequence, tokens, pages))
        return prefill, copies, ready, later

    def _sibling_follows(self) -> bool:
        """Whether the next two in the queue start from the same prompt, neither with own tokens."""
        if len(self.waiting) < 2:
            return False
        first, second = self.waiting[0], self.waiting[1]
        return first.prompt == second.prompt and not len(first.tokens) and not len(second.tokens)

    def _room(self, needed: int, entered: list[int]) -> bool:
        """Whether `needed` pages leave each live sequence its next page.

        Without that margin a newcomer would be sent back within a few tokens. A sequence that
        runs alone only has to fit.
        """
        rows = np.concatenate([self.rows, np.array(entered, np.int64)])
        final = -(-(self._cached[rows] - self._count[rows] + self._limit[rows]) // self.page_size)
        margin = min(len(rows), int((final - self._held[rows]).sum()))
        return needed + margin <= self.pool.free

    def _enter(self, sequence: Sequence, tokens: np.ndarray, pages: np.ndarray) -> int:
        slot = self._free_slots.pop()
        generated = len(sequence.tokens)
        self._sequence[slot] = sequence
        self._key[slot] = self._stream_keys[sequence.prompt, sequence.sample]
        self._limit[slot] = self.limits[sequence.prompt]
        self._count[slot] = generated
        self._cached[slot] = len(tokens) - 1
        self._last[slot] = tokens[-1]
        self._held[slot] = len(pages)
        self._pages[slot, : len(pages)] = pages
        self._tokens[slot, :generated] = sequence.tokens
        self._logprobs[slot, :generated] = sequence.logprobs
        return slot

    def _leave(self, slot: int) -> Sequence:
        """Frees slot and pages; the sequence takes its tokens with it."""
        sequence = self._sequence[slot]
        assert sequence is not None
        count = self._count[slot]
        sequence.tokens = self._tokens[slot, :count].copy()
        sequence.logprobs = self._logprobs[slot, :count].copy()
        self.pool.release(self._pages[slot, : self._held[slot]])
        self._sequence[slot] = None
        self._free_slots.append(slot)
        return sequence
