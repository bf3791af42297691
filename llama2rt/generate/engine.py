"""Sampling of many prompts at once from a `Llama`: what rollouts, rejection sampling and chat use.

The engine owns no weights: it reads the model's as they are at each forward pass, so a policy may
be updated between calls. Nothing is kept from one call to the next; the cache lives for one call.
Left out: serving (a request queue that outlives a call), speculative decoding, quantised caches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from llama2rt.errors import InputError, naming
from llama2rt.generate import scheduler
from llama2rt.generate.budget import Budget, plan
from llama2rt.generate.kv_cache import PAGE_SIZE, Addresses, KVCache
from llama2rt.generate.sampling import (
    MOST,
    check_options,
    check_whole,
    choose,
    stream_keys,
    uniforms,
)
from llama2rt.memory import free_bytes
from llama2rt.model.llama import Llama
from llama2rt.parallel import faults
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
    with the same samples.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        *,
        page_size: int = PAGE_SIZE,
        max_sequences: int = 256,
        cache_bytes: int | None = None,
    ) -> None:
        check_whole("page_size", page_size, 1)
        check_whole("max_sequences", max_sequences, 1)
        if cache_bytes is not None:
            check_whole("cache_bytes", cache_bytes, 1, 2**63 - 1)
        self.model, self.tokenizer = model, tokenizer
        self.page_size, self.max_sequences = page_size, max_sequences
        self.cache_bytes = cache_bytes

    def of(self, model: Llama) -> "Engine":
        """The same sampler of another model, such as this one's weights in one piece."""
        return Engine(
            model,
            self.tokenizer,
            page_size=self.page_size,
            max_sequences=self.max_sequences,
            cache_bytes=self.cache_bytes,
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
        if len(prompts) * n > MOST:
            raise InputError(f"n: expected at most {MOST} samples in all, got {len(prompts)} x {n}")
        numbers = range(len(prompts)) if indices is None else indices
        if len(numbers) != len(prompts):
            raise InputError(f"indices: expected {len(prompts)}, got {len(numbers)}")
        encoded = self._encode(prompts)
        completions: list[Completion | None] = [None] * (len(prompts) * n)
        keys = stream_keys(seed, np.repeat(numbers, n), np.tile(np.arange(n), len(prompts)))
        for _, finished in self._steps(
            encoded, keys.reshape(-1, n), temperature, top_p, top_k, max_tokens
        ):
            for sequence in finished:
                i, tokens = sequence.prompt, sequence.tokens.tolist()
                prompt_tokens = encoded[i].tolist()
                completion = Completion(
                    prompt_index=numbers[i],
                    prompt_tokens=prompt_tokens,
                    text=self._text(prompts[i], prompt_tokens, tokens),
                    tokens=tokens,
                    logprobs=sequence.logprobs.tolist(),
                    finish_reason=sequence.finish_reason,
                )
                completions[i * n + sequence.sample] = completion
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
        check_options(1, temperature, top_p, top_k, max_tokens, seed)
        encoded = self._encode([prompt])
        tokens: list[int] = []
        shown = ""
        keys = stream_keys(seed, np.zeros(1, np.int64), np.zeros(1, np.int64))[:, None]
        for sampled, finished in self._steps(encoded, keys, temperature, top_p, top_k, max_tokens):
            tokens += sampled.tolist()
            text = self._text(prompt, encoded[0].tolist(), tokens)
            if finished or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text

    def _encode(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        config = self.model.config
        encoded = []
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise InputError(f"prompt {i}: empty")
            if isinstance(prompt[0], Mapping):
                with naming(f"prompt {i}"):
                    prompt = chat.encode_prompt(self.tokenizer, cast(chat.Messages, prompt))
            tokens = np.asarray(prompt)  # int32 only when all are known to fit it
            if len(tokens) >= config.context:
                raise InputError(
                    f"prompt {i}: {len(tokens)} tokens leave no room in the context of "
                    f"{config.context}"
                )
            if tokens.min() < 0 or tokens.max() >= config.vocab_size:
                raise InputError(f"prompt {i}: token id outside 0..{config.vocab_size - 1}")
            encoded.append(tokens.astype(np.int32))
        return encoded

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

    @torch.inference_mode()
    def _steps(
        self,
        prompts: list[np.ndarray],
        keys: np.ndarray,
        temperature: float,
        top_p: float,
        top_k: int,
        max_tokens: int,
    ) -> Iterator[tuple[np.ndarray, list[scheduler.Sequence]]]:
        """Yields each forward pass's sampled tokens and the sequences it finished. `keys` uint64
        [P, n]: the random streams of each prompt's samples."""
        model, page_size = self.model, self.page_size
        lengths = np.array([len(tokens) for tokens in prompts], np.int32)
        limits = np.minimum(min(max_tokens, model.config.context), model.config.context - lengths)
        budget = self._budget(lengths, limits, keys.shape[1], bool(top_k or top_p < 1))
        queue = scheduler.Scheduler(
            prompts, limits, keys, self.tokenizer.stop_ids, budget, page_size
        )
        cache = KVCache(model.config.layers, budget.pages, page_size)
        training = model.training
        model.eval()
        try:
            while queue.unfinished:
                faults.moved()
                step = queue.step()
                tokens, logprobs = self._forward(step, cache, temperature, top_p, top_k)
                yield tokens, queue.record(step, tokens, logprobs)
        finally:
            model.train(training)

    def _budget(self, lengths: np.ndarray, limits: np.ndarray, n: int, restricted: bool) -> Budget:
        """What the call may hold at once; InputError where one sample alone needs more."""
        allowed = self.cache_bytes
        if allowed is None:
            allowed = free_bytes(self.model.output.weight.device) // 2
        try:
            return plan(
                self.model,
                lengths,
                limits,
                n,
                allowed=allowed,
                page_size=self.page_size,
                max_sequences=self.max_sequences,
                restricted=restricted,
            )
        except InputError as error:
            default = " (half of the free memory)" if self.cache_bytes is None else ""
            raise InputError(f"{error}{default}") from None

    def _forward(
        self, step: scheduler.Step, cache: KVCache, temperature: float, top_p: float, top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        device = self.model.output.weight.device

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        decoding = len(step.lengths)
        prefilled = len(step.tokens) - decoding
        chosen, logprobs = np.empty(0, np.int32), np.empty(0, np.float32)
        if len(step.tokens):
            cache.addresses = Addresses(
                slots=put(step.slots),
                prompt_cu_seqlens=put(step.cu_seqlens),
                prompt_tokens=prefilled,
                longest_prompt=int(np.diff(step.cu_seqlens).max(initial=0)),
                block_table=put(step.block_table),
                lengths=put(step.lengths),
            )
            hidden = self.model.transformer(put(step.tokens).long(), put(step.positions), cache)
            if decoding:
                logits = self.model.output(hidden[prefilled:]).float()
                uniform = put(uniforms(step.keys, step.counts))
                sampled = choose(logits, uniform, temperature=temperature, top_p=top_p, top_k=top_k)
                chosen, logprobs = (tensor.cpu().numpy() for tensor in sampled)
                if np.isnan(logprobs).any():
                    raise FloatingPointError(
                        "the model's logits are not finite: its weights are damaged, training "
                        "diverged, or the temperature is too small to divide by"
                    )
        if step.copies.size:
            cache.copy(*put(step.copies))
        return chosen, logprobs
