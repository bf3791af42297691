"""Requests that come and go while others run: what a server, or anything that streams, builds on.

A session outlives its requests and keeps pages that later prompts may begin with. It is one
thread's: what other threads want, they ask that thread for between two steps.
"""

from typing import TYPE_CHECKING

import numpy as np

from llama2rt.errors import InputError
from llama2rt.generate.generation import Generation
from llama2rt.generate.request import Request, SamplingOptions, Statistics, Update
from llama2rt.generate.sampling import stream_keys
from llama2rt.generate.scheduler import Scheduler
from llama2rt.generate.slots import Sequence
from llama2rt.generate.text import TextStream

if TYPE_CHECKING:
    from llama2rt.generate.engine import Engine, Prompt


class _Shown:
    """How far a request has been reported, and its text."""

    def __init__(self, text: TextStream) -> None:
        self.text = text
        self.count = 0  # tokens


class Session:
    """Made by `Engine.session`; `close` it, or use it as a context.

    An answer depends on the weights, its prompt, its options and its sample number alone: it is
    that of `Engine.generate([prompt], n, seed=seed)`, whatever runs beside it. Weights may change
    between steps: what runs is then computed again with the new ones, from the tokens it has. The
    model is in evaluation mode while its session is open.
    """

    def __init__(self, engine: "Engine", scheduler: Scheduler) -> None:
        self._engine, self._scheduler = engine, scheduler
        self._generation = Generation(engine.runner, scheduler)
        self._shown: dict[int, _Shown] = {}
        self._aborted: list[Update] = []
        self._next_id = 0
        self._last_prompt = np.empty(0, np.int32)
        self._parameters = list(engine.model.parameters())
        self._weights = self._version()
        self._training = engine.model.training
        engine.model.eval()
        self._closed = False

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.unfinished or bool(self._aborted)

    @property
    def statistics(self) -> Statistics:
        scheduler = self._scheduler
        pool = scheduler.pool
        return Statistics(
            running=len(scheduler.rows),
            waiting=len(scheduler.waiting),
            pages=pool.pages,
            pages_used=pool.pages - pool.free,
            pages_cached=pool.cached,
            prefix_hits=scheduler.prefix.hits,
            prompt_tokens=scheduler.prompt_tokens,
            tokens=scheduler.tokens,
            preemptions=scheduler.preemptions,
            guesses=scheduler.guesses,
            accepted=scheduler.accepted,
        )

    def add(self, prompt: "Prompt", options: SamplingOptions, *, sample: int = 0) -> int:
        """Queues one answer to `prompt`, token ids or messages; returns the request's id.

        `sample` numbers the answers to one prompt: each has its own random stream. InputError as
        `Engine.generate`'s, and where the answer may need more pages than there are.
        """
        if self._closed:
            raise ValueError("the session is closed")
        engine = self._engine
        tokens = engine.encode(prompt, "prompt")
        limit = min(options.max_tokens, engine.model.config.context - len(tokens))
        needed = -(-(len(tokens) + limit) // self._scheduler.page_size)
        if needed > self._scheduler.pool.pages:
            raise InputError(
                f"cache_bytes: holds {self._scheduler.pool.pages} pages of "
                f"{self._scheduler.page_size} tokens, a prompt of {len(tokens)} and up to {limit} "
                f"more need {needed}"
            )
        if np.array_equal(tokens, self._last_prompt):
            tokens = self._last_prompt  # the scheduler knows samples of one prompt by its array
        self._last_prompt = tokens
        identifier, self._next_id = self._next_id, self._next_id + 1
        key = stream_keys(options.seed, np.zeros(1, np.int64), np.array([sample]))[0]
        stop_ids = tuple(dict.fromkeys((*engine.tokenizer.stop_ids, *options.stop_ids)))
        self._scheduler.add(Request(identifier, tokens, options, key, limit, stop_ids))
        text = engine.text_stream(prompt, tokens.tolist(), options.stop)
        self._shown[identifier] = _Shown(text)
        return identifier

    def abort(self, identifier: int) -> bool:
        """Ends a request at once and frees its pages; the next `step` reports it. False where it
        has ended already."""
        sequence = self._scheduler.abort(identifier)
        if sequence is not None:
            self._aborted.append(self._finished(sequence))
        return sequence is not None

    def reset(self) -> None:
        """Forgets all keys and values, as `step` does where torch has written to a parameter or
        given it other data; for whoever changes weights in another way."""
        self._engine.runner.refresh()
        self._scheduler.reset()
        self._weights = self._version()

    def step(self) -> list[Update]:
        """One forward pass: what it added to each answer, and what ended since the last."""
        updates, self._aborted = self._aborted, []
        if not self._scheduler.unfinished:
            return updates
        if self._version() != self._weights:
            self.reset()
        try:
            step, finished = self._generation.advance()
        except BaseException:
            self.reset()  # pages may not hold what they were to hold
            raise
        updates += [self._finished(sequence) for sequence in finished]
        sequences = self._scheduler.slots.sequences
        for slot in step.rows.tolist():
            sequence = sequences[slot]
            if sequence is not None:
                updates.append(self._running(slot, sequence))
        return updates

    def close(self) -> None:
        """Drops all requests and the cache."""
        if self._closed:
            return
        self._closed = True
        self._scheduler.waiting.clear()
        self._scheduler.reset()
        self._scheduler.waiting.clear()
        del self._generation  # and the pages
        self._engine.model.train(self._training)
        self._shown.clear()
        self._aborted.clear()

    def _running(self, slot: int, sequence: Sequence) -> Update:
        shown = self._shown[sequence.request.id]
        begin = shown.count
        tokens, logprobs = self._scheduler.slots.answer(slot, begin)
        used = shown.text.add(tokens.tolist())
        if shown.text.stopped:
            sequence = self._scheduler.finish(slot, "stop")
            return self._last(sequence, begin, begin + used)
        shown.count += used
        return Update(
            sequence.request.id,
            tokens.tolist(),
            logprobs.tolist(),
            sequence.top[begin:],
            shown.text.show(),
        )

    def _finished(self, sequence: Sequence) -> Update:
        shown = self._shown[sequence.request.id]
        begin, end = shown.count, len(sequence.tokens)
        used = shown.text.add(sequence.with_text[begin:].tolist())
        if shown.text.stopped:
            sequence.finish_reason = "stop"
            end = begin + used
        return self._last(sequence, begin, end)

    def _last(self, sequence: Sequence, begin: int, end: int) -> Update:
        shown = self._shown.pop(sequence.request.id)
        return Update(
            sequence.request.id,
            sequence.tokens[begin:end].tolist(),
            sequence.logprobs[begin:end].tolist(),
            sequence.top[begin:end],
            shown.text.show(final=True),
            sequence.finish_reason,
        )

    def _version(self) -> list[tuple[int, int]]:
        """Changes whenever torch writes to a weight or gives it other data."""
        return [
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in self._parameters
        ]
