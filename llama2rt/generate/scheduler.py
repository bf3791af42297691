"""Continuous batching: which sequences run in the next forward pass, and which pages are theirs.

Host only (numpy), and vectorised over sequences: per step there is no Python work per sequence,
only at its admission and its end. A step decodes a token of every sequence that has its prompt in
the cache (and checks the guesses behind it), and in the same forward pass computes prompts, or
chunks of them: up to the last token, which is the first that each sequence decodes. So every
sampled token comes from a decoded row. Neighbours in the queue with one prompt (one array) start
from the same pages; those that need a copy of its last, partly filled page begin one step later.
Others find the full pages of prompts that begin alike (`prefix`). Pages are given out as sequences
grow; when none is left, the youngest sequence goes back to the queue and is computed again, with
the tokens it had, once there is room. Left out: priorities.
"""

from collections import deque

import numpy as np

from llama2rt.generate.batch import Chunk, Step
from llama2rt.generate.budget import Budget
from llama2rt.generate.prefix import PrefixCache
from llama2rt.generate.request import Request
from llama2rt.generate.sampling import Choice
from llama2rt.generate.slots import Sequence, Slots
from llama2rt.generate.speculate import look_up


class Scheduler:
    """Runs requests of at most `length` tokens, prompt and answer.

    `budget` bounds what runs at once: its pages of `page_size` tokens, its sequences, and the
    prompt tokens that a step computes; a longer prompt is computed in chunks of so many. Whoever
    adds a request has made sure that it fits when it runs alone. `speculate`: most guesses behind
    each decoded token. `keep_answers`: prompts may begin as finished answers do (a dialogue).
    """

    def __init__(
        self,
        budget: Budget,
        page_size: int,
        length: int,
        *,
        speculate: int = 0,
        keep_answers: bool = False,
    ) -> None:
        self.prefill_tokens, self.page_size = budget.prefill_tokens, page_size
        self.speculate, self.keep_answers = speculate, keep_answers
        self.prefix = PrefixCache(budget.pages, page_size)
        self.pool = self.prefix.pool
        self.waiting: deque[Sequence] = deque()
        # Each holds a page of its own.
        self.slots = Slots(min(budget.sequences, budget.pages), length + speculate, page_size)
        self.rows = np.empty(0, np.int64)  # live slots, oldest first
        self._partial: list[int] = []  # those of them whose prompts are computed in chunks
        # Pages of a computed prompt, referenced here while the queue's front holds samples of it.
        self._shared: np.ndarray | None = None
        self.prompt_tokens = self.tokens = self.preemptions = self.guesses = self.accepted = 0

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or len(self.rows) > 0

    def add(self, request: Request) -> None:
        """Last in the queue."""
        self.waiting.append(Sequence(request))

    def abort(self, identifier: int) -> Sequence | None:
        """Takes a request out between two steps, whether it waits or runs; None if neither."""
        for slot in self.rows.tolist():
            sequence = self.slots.sequences[slot]
            if sequence is not None and sequence.request.id == identifier:
                return self.finish(slot, "abort")
        for sequence in self.waiting:
            if sequence.request.id == identifier:
                self._release_shared()  # the queue's front may be another prompt's now
                self.waiting.remove(sequence)
                sequence.finish_reason = "abort"
                return sequence
        return None

    def finish(self, slot: int, reason: str) -> Sequence:
        """Ends what runs in `slot`, between two steps."""
        self.rows = self.rows[self.rows != slot]
        sequence = self._leave(slot)
        sequence.finish_reason = reason
        return sequence

    def reset(self) -> None:
        """Forgets all keys and values: what runs is computed again, no prefix is known."""
        self._release_shared()
        for slot in self.rows[::-1].tolist():
            self.waiting.appendleft(self._leave(slot))
        self.rows = self.rows[:0]
        self.prefix.clear()

    def step(self) -> Step:
        """Grows the live sequences by a page where one is full, continues prompts, then admits
        waiting sequences."""
        guesses = self._grow()
        chunks = self._continue()
        rows = self.rows[~np.isin(self.rows, self._partial)] if self._partial else self.rows
        copies, ready, later = self._admit(chunks)
        new = np.array(ready, np.int64)
        self.rows = np.concatenate([self.rows, new, np.array(later, np.int64)])
        if guesses is not None:
            guesses = np.concatenate([guesses[rows], np.zeros(len(new), np.int32)])
        self.prompt_tokens += sum(len(chunk.tokens) for chunk in chunks)
        return Step(chunks, np.concatenate([rows, new]), guesses, copies)

    def record(self, step: Step, choice: Choice) -> list[Sequence]:
        """Takes what the step drew behind each decoded token and each guess; returns the sequences
        that are finished now."""
        slots, rows = self.slots, step.rows
        tokens, logprobs = choice.tokens[:, None], choice.logprobs[:, None]
        taken = np.ones(len(rows), np.int32)
        if step.guesses is not None:
            index, taken = self._check(step.guesses, rows, choice.tokens)
            tokens, logprobs = choice.tokens[index], choice.logprobs[index]
        ends = (tokens[:, :, None] == slots.stop_ids[rows][:, None]).any(2)
        if step.guesses is not None:
            ends &= np.arange(tokens.shape[1]) < taken[:, None]
            taken = np.where(ends.any(1), ends.argmax(1) + 1, taken).astype(np.int32)
            self.guesses += int(step.guesses.sum())
            self.accepted += int(taken.sum()) - len(rows)
        stopped = ends.any(1)
        if choice.top:
            self._record_top(step, choice.top, taken)
        slots.append(rows, tokens, logprobs, taken)
        self.tokens += int(taken.sum())
        done = stopped | (slots.counts[rows] >= slots.limits[rows])
        if not done.any():
            return []
        finished = []
        self.rows = self.rows[~np.isin(self.rows, rows[done])]
        for slot, stop in zip(rows[done].tolist(), stopped[done].tolist(), strict=True):
            sequence = self._leave(slot)
            sequence.finish_reason = "stop" if stop else "length"
            finished.append(sequence)
        return finished

    def _check(
        self, guesses: np.ndarray, rows: np.ndarray, drawn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices [B, K] of each row's drawn tokens in `drawn` [N], the last one repeated, and how
        many of them count: up to the first that is not what was guessed."""
        begins = (guesses + 1).cumsum() - guesses - 1
        behind = np.arange(int(guesses.max()) + 1)
        index = begins[:, None] + np.minimum(behind, guesses[:, None])
        places = self.slots.cached[rows][:, None] + 1 + behind[:-1]
        guessed = self.slots.tokens[rows[:, None], places]
        right = (drawn[index[:, :-1]] == guessed) & (behind[:-1] < guesses[:, None])
        return index, right.cumprod(1).sum(1).astype(np.int32) + 1

    def _record_top(
        self, step: Step, top: list[list[tuple[int, float]]], taken: np.ndarray
    ) -> None:
        each = np.ones(len(step.rows), np.int32) if step.guesses is None else step.guesses + 1
        begins = each.cumsum() - each
        for i in np.flatnonzero(self.slots.options.logprobs[step.rows]).tolist():
            sequence = self.slots.sequences[step.rows[i]]
            assert sequence is not None
            sequence.top += top[begins[i] : begins[i] + taken[i]]

    def _grow(self) -> np.ndarray | None:
        """Gives each live sequence the pages of its next tokens. Returns the number of guesses of
        each slot [slots], or None."""
        slots = self.slots
        guesses = self._guess()
        while True:
            rows = self.rows
            last = slots.cached[rows] if guesses is None else (slots.cached + guesses)[rows]
            needed = last // self.page_size + 1 - slots.held[rows]
            if needed.clip(min=0).sum() <= self.pool.free:
                break
            if guesses is not None:
                guesses = None
            elif self._shared is not None:
                self._release_shared()  # computed again when its samples enter
            else:
                self.waiting.appendleft(self._leave(int(rows[-1])))
                self.rows = rows[:-1]
                self.preemptions += 1
        for more in range(int(needed.max(initial=0))):
            full = rows[needed > more]
            slots.pages[full, slots.held[full]] = self.pool.take(len(full))
            slots.held[full] += 1
        return guesses

    def _guess(self) -> np.ndarray | None:
        if not self.speculate or not len(self.rows):
            return None
        slots, rows = self.slots, self.rows
        most = np.minimum(self.speculate, slots.limits[rows] - slots.counts[rows] - 1)
        most[np.isin(rows, self._partial)] = 0
        lengths = slots.prompts[rows] + slots.counts[rows]
        width = int(lengths.max()) + self.speculate
        tokens = slots.tokens[rows, :width]
        found = look_up(tokens, lengths, most)
        if not found.any():
            return None
        slots.tokens[rows, :width] = tokens
        guesses = np.zeros(len(slots.sequences), np.int32)
        guesses[rows] = found
        return guesses

    def _continue(self) -> list[Chunk]:
        """The next chunks of prompts that were begun in earlier steps."""
        slots, left, chunks = self.slots, self.prefill_tokens, []
        for slot in list(self._partial):
            begin = int(slots.cached[slot])
            end = min(int(slots.prompts[slot] + slots.counts[slot]) - 1, begin + left)
            if end > begin:
                pages = slots.pages[slot, : slots.held[slot]]
                chunks.append(Chunk(slots.tokens[slot, begin:end], begin, pages))
                left -= end - begin
                slots.cached[slot] = end
                self._know(slot)
            if end == slots.prompts[slot] + slots.counts[slot] - 1:
                self._partial.remove(slot)
        return chunks

    def _admit(self, chunks: list[Chunk]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """Adds to `chunks` the prompts of sequences that enter. Returns (source, target) pages to
        copy after the forward pass, slots that decode in it and slots that decode later."""
        copies: list[tuple[int, int]] = []
        ready: list[int] = []
        later: list[int] = []
        while self.waiting and self.slots.free:
            sequence = self.waiting[0]
            context = sequence.context
            cached = len(context) - 1
            entering = ready
            pages = self._shared
            if pages is None:
                begun = self._begin(sequence, context, chunks, ready + later)
                if begun is None:
                    break
                pages, end = begun
                if end < cached:
                    self.waiting.popleft()
                    slot = self.slots.enter(sequence, context, pages, end)
                    self._partial.append(slot)
                    later.append(slot)
                    continue
                if self._sibling_follows():
                    self._shared = pages
            if self._shared is not None:
                full, tail = divmod(cached, self.page_size)
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
            entering.append(self.slots.enter(sequence, context, pages, cached))
        return copies, ready, later

    def _begin(
        self, sequence: Sequence, context: np.ndarray, chunks: list[Chunk], entered: list[int]
    ) -> tuple[np.ndarray, int] | None:
        """Pages for all of `context` and the number of its tokens that will be in them after the
        forward pass, to which `chunks` adds; None where the step or the pool has no room for it."""
        if sequence.chain is None:
            sequence.chain = self.prefix.chain(context[:-1])
        known = self.prefix.find(sequence.chain)
        begin, cached = len(known) * self.page_size, len(context) - 1
        used = sum(len(chunk.tokens) for chunk in chunks)
        if used and used + cached - begin > self.prefill_tokens:
            return None
        needed = cached // self.page_size + 1 - len(known)
        if not self._room(needed + self.pool.unreferenced(known), entered):
            return None
        self.pool.share(known)
        self.prefix.hits += begin
        pages = np.concatenate([known, self.pool.take(needed)])
        end = min(cached, begin + self.prefill_tokens)
        if end > begin:
            chunks.append(Chunk(context[begin:end], begin, pages))
        self.prefix.add(sequence.chain[: end // self.page_size], pages)
        return pages, end

    def _know(self, slot: int) -> None:
        """The full pages in `slot` are found by prompts that begin as what they hold."""
        chain = self.prefix.chain(self.slots.tokens[slot, : self.slots.cached[slot]])
        self.prefix.add(chain, self.slots.pages[slot])

    def _sibling_follows(self) -> bool:
        """Whether the next two in the queue start from the same prompt, neither with own tokens."""
        if len(self.waiting) < 2:
            return False
        first, second = self.waiting[0], self.waiting[1]
        same = first.request.prompt is second.request.prompt
        return same and not len(first.tokens) and not len(second.tokens)

    def _room(self, needed: int, entered: list[int]) -> bool:
        """Whether `needed` pages leave each live sequence its next page.

        Without that margin a newcomer would be sent back within a few tokens. A sequence that
        runs alone only has to fit.
        """
        slots = self.slots
        rows = np.concatenate([self.rows, np.array(entered, np.int64)])
        final = -(-(slots.prompts[rows] - 1 + slots.limits[rows]) // self.page_size)
        margin = min(len(rows), int((final - slots.held[rows]).sum()))
        return needed + margin <= self.pool.free

    def _release_shared(self) -> None:
        if self._shared is not None:
            self.pool.release(self._shared)
            self._shared = None

    def _leave(self, slot: int) -> Sequence:
        """Frees slot and pages; the sequence takes its tokens with it."""
        if self.keep_answers:
            self._know(slot)
        if slot in self._partial:
            self._partial.remove(slot)
        self.pool.release(self.slots.pages[slot, : self.slots.held[slot]])
        return self.slots.leave(slot)
