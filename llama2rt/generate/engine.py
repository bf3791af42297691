"""Sampling of many prompts at once from a `Llama`: what rollouts, rejection sampling and chat use.

The engine owns no weights: it reads the model's as they are at each forward pass, so a policy may
be updated between calls. `generate` and `stream` keep nothing from one call to the next; a
`session` keeps its cache until it is closed. Left out: quantised caches.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from llama2rt.errors import InputError, naming
from llama2rt.generate.budget import Bounds, Budget, plan, plan_session
from llama2rt.generate.generation import Generation
from llama2rt.generate.kv_cache import PAGE_SIZE
from llama2rt.generate.request import Request, SamplingOptions
from llama2rt.generate.runner import Runner, Weights
from llama2rt.generate.sampling import MOST, check_options, check_whole, stream_keys
from llama2rt.generate.scheduler import Scheduler
from llama2rt.generate.session import Session
from llama2rt.generate.text import TextStream
from llama2rt.memory import free_bytes
from llama2rt.model.llama import Llama
from llama2rt.parallel import tensor_group
from llama2rt.text import chat

Prompt = Sequence[int] | chat.Messages


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample.

    `tokens` as sampled, the EOS included if the model produced it: finish_reason "stop", otherwise
    "length". `logprobs[i]` is that of `tokens[i]` at the sampling temperature (1 for argmax) over
    the whole vocabulary. `text` leaves the EOS out: for messages the answer, stripped; for token
    ids what continues the prompt's own text.
    """

    prompt_index: int
    prompt_tokens: list[int]
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


class Engine:
    """Continuous-batching sampler over `model` and its `tokenizer`.

    At most `max_sequences` sequences run at once in a paged cache of keys and values, in pages of
    `page_size` tokens. A call takes, beside the model, at most `cache_bytes` for the cache and its
    forward passes (`budget`), by default half of the memory that is free on the model's device when
    the call begins. Where that is less than all sequences can need, they wait or are recomputed,
    with the same samples. `speculate`: guess up to so many tokens behind each decoded one where
    its prompt or answer has gone on before, and check them in one forward pass (`speculate.py`):
    faster where answers repeat and a pass costs little more for more tokens; the same samples.
    `weights`: "same" as the model's, or "int8" on a CPU: half of bf16's bytes, a little less exact.
    `runner` says what forward passes run on; on a CPU it keeps a packed copy of the weights.
    `as_trained`: log-probabilities are rounded as in training where that can be. Packed weights of
    16 bits are not: their passes round less often (0.015 nats a token apart in bf16), so they are
    not used then. Where the CPU multiplies bf16 (AVX-512, oneDNN), torch's products round by the
    number of rows, and modules and packed passes are equally far from training: there the faster
    ones are used.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        *,
        page_size: int = PAGE_SIZE,
        max_sequences: int = 256,
        cache_bytes: int | None = None,
        speculate: int = 0,
        weights: Weights = "same",
        as_trained: bool = False,
    ) -> None:
        check_whole("page_size", page_size, 1)
        check_whole("max_sequences", max_sequences, 1)
        check_whole("speculate", speculate, 0, 64)
        if cache_bytes is not None:
            check_whole("cache_bytes", cache_bytes, 1, 2**63 - 1)
        self.model, self.tokenizer = model, tokenizer
        self.page_size, self.max_sequences = page_size, max_sequences
        self.cache_bytes, self.speculate = cache_bytes, speculate
        self.runner = Runner(model, weights, as_trained=as_trained)

    def of(self, model: Llama) -> "Engine":
        """The same sampler of another model, such as this one's weights in one piece."""
        return Engine(
            model,
            self.tokenizer,
            page_size=self.page_size,
            max_sequences=self.max_sequences,
            cache_bytes=self.cache_bytes,
            speculate=self.speculate,
            weights=self.runner.weights,
            as_trained=self.runner.as_trained,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens: int = 256,
        seed: int = 0,
        *,
        indices: Sequence[int] | None = None,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """`n` samples of each prompt, in prompt order, n after n.

        A prompt is a list of token ids or of messages. Argmax at temperature 0; top_p 1 and top_k 0
        mean no limit. A sample depends on the weights, its prompt, `seed`, prompt index and sample
        index only. `indices` [P] are the prompts' where these are some of more, so that each is
        answered as among all of them; by default they count from 0. Sequences end at EOS (any id
        that the folder names), `max_tokens` or the model's context. `on_finish` is called with each
        sample as it ends, in any order (a progress bar). InputError names, before the first forward
        pass, an option outside its range, a prompt that is empty, holds an unknown token or leaves
        no room in the context, and one that needs more than `cache_bytes`; FloatingPointError where
        logits are not finite.
        """
        check_options(n, temperature, top_p, top_k, max_tokens, seed)
        options = SamplingOptions(temperature, top_p, top_k, max_tokens=max_tokens, seed=seed)
        if len(prompts) * n > MOST:
            raise InputError(f"n: expected at most {MOST} samples in all, got {len(prompts)} x {n}")
        numbers = range(len(prompts)) if indices is None else indices
        if len(numbers) != len(prompts):
            raise InputError(f"indices: expected {len(prompts)}, got {len(numbers)}")
        encoded = [self.encode(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        keys = stream_keys(seed, np.repeat(numbers, n), np.tile(np.arange(n), len(prompts)))
        generation = self._generation(encoded, keys, options)
        completions: list[Completion | None] = [None] * (len(prompts) * n)
        with self._sampling():
            while generation.scheduler.unfinished:
                _, finished = generation.advance()
                for sequence in finished:
                    i = sequence.request.id // n
                    tokens, prompt_tokens = sequence.tokens.tolist(), encoded[i].tolist()
                    completion = Completion(
                        prompt_index=numbers[i],
                        prompt_tokens=prompt_tokens,
                        text=self._text(prompts[i], prompt_tokens, tokens),
                        tokens=tokens,
                        logprobs=sequence.logprobs.tolist(),
                        finish_reason=cast(str, sequence.finish_reason),
                    )
                    completions[sequence.request.id] = completion
                    if on_finish is not None:
                        on_finish(completion)
        return cast(list[Completion], completions)

    def stream(
        self,
        prompt: Prompt,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> Iterator[str]:
        """One sample of one prompt as pieces of text; a character is held back until complete."""
        options = SamplingOptions(temperature, top_p, top_k, max_tokens=max_tokens, seed=seed)
        encoded = self.encode(prompt, "prompt 0")
        keys = stream_keys(seed, np.zeros(1, np.int64), np.zeros(1, np.int64))
        generation = self._generation([encoded], keys, options)
        text = self.text_stream(prompt, encoded.tolist())
        shown = 0
        with self._sampling():
            while generation.scheduler.unfinished:
                step, finished = generation.advance()
                if finished:
                    tokens = finished[0].with_text[shown:]
                else:
                    tokens = generation.scheduler.slots.answer(int(step.rows[0]), shown)[0]
                shown += text.add(tokens.tolist())
                yield text.show(final=bool(finished))

    def session(self) -> Session:
        """Where requests with options of their own come and go: see `Session`. InputError where
        `cache_bytes` holds no page."""
        budget = self._within(lambda bounds: plan_session(self.model, bounds), restricted=True)
        scheduler = Scheduler(
            budget,
            self.page_size,
            self.model.config.context,
            speculate=self.speculate,
            keep_answers=True,
        )
        return Session(self, scheduler)

    def encode(self, prompt: Prompt, name: str) -> np.ndarray:
        """int32 tokens of a prompt that the model can answer; InputError beginning with `name`."""
        config = self.model.config
        if len(prompt) == 0:
            raise InputError(f"{name}: empty")
        if isinstance(prompt[0], Mapping):
            with naming(name):
                prompt = chat.encode_prompt(self.tokenizer, cast(chat.Messages, prompt))
        tokens = np.asarray(prompt)  # int32 only when all are known to fit it
        if len(tokens) >= config.context:
            raise InputError(
                f"{name}: {len(tokens)} tokens leave no room in the context of {config.context}"
            )
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            raise InputError(f"{name}: token id outside 0..{config.vocab_size - 1}")
        return tokens.astype(np.int32)

    def text_stream(
        self, prompt: Prompt, tokens: list[int], stop: tuple[str, ...] = ()
    ) -> TextStream:
        """Text of the answer to `prompt`, which encodes to `tokens`, as it comes."""
        message = isinstance(prompt[0], Mapping)
        return TextStream(self.tokenizer, tokens, strip=message, stop=stop)

    def _text(self, prompt: Prompt, prompt_tokens: list[int], tokens: list[int]) -> str:
        if tokens and tokens[-1] in self.tokenizer.stop_ids:
            tokens = tokens[:-1]
        # A vocabulary padded for speed has rows without text; a rollout must not fail on one.
        tokens = [token for token in tokens if token < self.tokenizer.vocab_size]
        decode = self.tokenizer.decode
        if isinstance(prompt[0], Mapping):
            return decode(tokens).strip()
        # Decoded alone, a continuation would lose the space in front of its first word.
        return decode(prompt_tokens + tokens)[len(decode(prompt_tokens)) :]

    def _generation(
        self, prompts: list[np.ndarray], keys: np.ndarray, options: SamplingOptions
    ) -> Generation:
        """What answers `prompts` with the random streams `keys` uint64 [P * n], n for each."""
        context = self.model.config.context
        n = len(keys) // max(1, len(prompts))
        lengths = np.array([len(tokens) for tokens in prompts], np.int32)
        limits = np.minimum(min(options.max_tokens, context), context - lengths)
        budget = self._within(
            lambda bounds: plan(self.model, lengths, limits, n, bounds),
            restricted=bool(options.top_k or options.top_p < 1),
        )
        longest = int((lengths + limits).max(initial=0))
        scheduler = Scheduler(budget, self.page_size, longest, speculate=self.speculate)
        stop_ids = self.tokenizer.stop_ids
        for i, key in enumerate(keys):
            p = i // n
            scheduler.add(Request(i, prompts[p], options, key, int(limits[p]), stop_ids))
        return Generation(self.runner, scheduler)

    def _within(self, plan: Callable[[Bounds], Budget], restricted: bool) -> Budget:
        """What a call may hold at once; InputError where that is too little. The weights are packed
        first, if they are to be: what is free then is free for the call."""
        self.runner.refresh()
        allowed = self.cache_bytes
        if allowed is None:
            free = free_bytes(self.model.output.weight.device)
            allowed = tensor_group.least(self.model, free) // 2
        bounds = Bounds(
            allowed, self.page_size, self.max_sequences, self.speculate, restricted=restricted
        )
        try:
            return plan(bounds)
        except InputError as error:
            default = " (half of the free memory)" if self.cache_bytes is None else ""
            raise InputError(f"{error}{default}") from None

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
