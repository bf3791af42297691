"""Samples from a server that speaks OpenAI's API, with the face of `Engine`: rollouts by vLLM,
SGLang, llama.cpp, `transformers serve` or `llama2rt serve`.

The weights are ours, the sampling is the server's. What it sends back is therefore checked against
the model here: the prompt's tokens, that no answer goes on behind its end, and the
log-probabilities of some answers, which other weights, another temperature or another chat format
would change. Weights that change are handed over before the next call (`handover`).

Left out: streams; stop texts; several ranks, each of which would hand its weights over.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from llama2rt.data.packing import Example, micro_batches
from llama2rt.errors import InputError, naming
from llama2rt.generate.engine import Completion, Prompt
from llama2rt.generate.remote.client import Client
from llama2rt.generate.remote.dialects import Answer, Ask, of_server
from llama2rt.generate.remote.handover import Handover
from llama2rt.generate.sampling import check_options, check_whole
from llama2rt.model.llama import Llama
from llama2rt.text import chat

# Tokens of one forward pass of the check.
_MICRO_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """What one server is asked for, and how far it is trusted."""

    name: str | None = None
    """the model's name there; None for the only one that it lists"""
    kind: str = "auto"
    """which server it is: a key of `dialects.DIALECTS`, or auto"""
    concurrency: int = 32
    """most requests under way"""
    attempts: int = 6
    """how often one request is sent before its error counts"""
    timeout_s: float = 600.0
    """longest wait for one answer"""
    check: int = 8
    """answers of each call whose log-probabilities are compared; 0: none"""
    tolerance: float = 0.25
    """how far a token's log-probability may be from ours, in nats; in bf16 two correct samplers
    differ by a tenth now and then, in fp32 by less than 1e-4"""

    def __post_init__(self) -> None:
        for field, least in (("concurrency", 1), ("attempts", 1), ("check", 0)):
            check_whole(field, getattr(self, field), least)
        for field in ("timeout_s", "tolerance"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{field}: expected a positive number, got {value}")


class Remote:
    """A sampler of `model`, whose weights the server at `url` holds; `tokenizer` is the model's.

    `handover` says how the server gets weights that have changed; without it, it must hold them
    when a call begins. InputError, when it is made, where no server of a known kind answers there.
    """

    def __init__(
        self,
        url: str,
        model: Llama,
        tokenizer: Any,
        *,
        api_key: str | None = None,
        options: RemoteOptions = RemoteOptions(),
        handover: Handover | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.client = Client(
            url, api_key=api_key, attempts=options.attempts, timeout_s=options.timeout_s
        )
        self.handover = handover
        self.name, self.dialect = of_server(self.client, options.name, options.kind)

    def of(self, model: Llama) -> "Remote":
        """The same server for another model, such as this one's weights in one piece."""
        other = object.__new__(Remote)
        vars(other).update(vars(self), model=model)
        return other

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
        """`Engine.generate` by the server: `n` samples of each prompt, in prompt order, n after n.

        A sample depends on `seed`, prompt index and sample index as far as the server keeps its
        word about seeds; it is not the one that `Engine` draws, but at temperature 0. InputError
        names the prompt that the server refuses, answers with other tokens than it was asked about
        or with log-probabilities that are not the model's; OSError the one that it gave no answer
        to after all attempts. Log-probabilities that the server does not give are ours; `on_finish`
        sees those that it gives.
        """
        check_options(n, temperature, top_p, top_k, max_tokens, seed)
        numbers = list(range(len(prompts)) if indices is None else indices)
        if len(numbers) != len(prompts):
            raise InputError(f"indices: expected {len(prompts)}, got {len(numbers)}")
        asked = [
            Ask(
                prompt=prompt,
                tokens=self._encode(prompt, i),
                n=n,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_tokens=max_tokens,
                seed=_derived(seed, number),
            )
            for i, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
        ]
        if self.handover is not None:
            self.handover.hand_over(self.model, self.tokenizer, self.client)
        answers: list[list[Answer]] = [[] for _ in prompts]
        for i, found in self._answered(asked):
            answers[i] = found
            if on_finish is not None:
                for answer in found:
                    on_finish(self._completion(asked[i], numbers[i], answer))
        self._settle(asked, answers, temperature)
        return [
            self._completion(ask, number, answer)
            for ask, number, found in zip(asked, numbers, answers, strict=True)
            for answer in found
        ]

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        config = self.model.config
        with naming(f"prompt {index}"):
            if len(prompt) == 0:
                raise InputError("empty")
            if isinstance(prompt[0], Mapping):
                tokens = chat.encode_prompt(self.tokenizer, cast(chat.Messages, prompt))
            else:
                tokens = [int(cast(int, token)) for token in prompt]
            if len(tokens) >= config.context:
                raise InputError(
                    f"{len(tokens)} tokens leave no room in the context of {config.context}"
                )
            if min(tokens) < 0 or max(tokens) >= config.vocab_size:
                raise InputError(f"token id outside 0..{config.vocab_size - 1}")
        return tokens

    def _answered(self, asked: Sequence[Ask]) -> Iterator[tuple[int, list[Answer]]]:
        """(index, answers) of each prompt as they come, a bounded number of requests at a time."""
        pool = concurrent.futures.ThreadPoolExecutor(self.options.concurrency)
        try:
            waiting = {pool.submit(self._ask, i, ask): i for i, ask in enumerate(asked)}
            for done in concurrent.futures.as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, index: int, ask: Ask) -> list[Answer]:
        """The n answers to one prompt; a server that gives one at a time is asked n times."""
        with naming(f"prompt {index}"):
            found = self._send(ask)
            if len(found) > ask.n:
                raise InputError(f"expected {ask.n} answers of {self.client.url}, got {len(found)}")
            while len(found) < ask.n:
                seed = _derived(ask.seed, len(found))
                found += self._send(dataclasses.replace(ask, n=1, seed=seed))[:1]
            return found

    def _send(self, ask: Ask) -> list[Answer]:
        ask = dataclasses.replace(
            ask, max_tokens=min(ask.max_tokens, self.model.config.context - len(ask.tokens))
        )
        path, body = self.dialect.request(ask, self.name, self.tokenizer)
        reply = self.client.post(path, body)
        found = self.dialect.answers(reply, ask, self.tokenizer)
        if not found:
            raise InputError(f"{self.client.url} gave no answer")
        for answer in found:
            self._check_tokens(answer, ask)
        return found

    def _check_tokens(self, answer: Answer, ask: Ask) -> None:
        """InputError unless the tokens are some that sampling could have ended with."""
        vocabulary, stops = self.model.config.vocab_size, self.tokenizer.stop_ids
        if not answer.tokens:
            raise InputError("the server gave an answer of no tokens, not even an EOS")
        if wrong := [t for t in answer.tokens if not 0 <= t < vocabulary]:
            raise InputError(f"the server gave token {wrong[0]}, outside 0..{vocabulary - 1}")
        if early := [i for i, t in enumerate(answer.tokens[:-1]) if t in stops]:
            raise InputError(
                f"the server's answer goes on behind token {early[0]}, which ends a sequence here: "
                "does its generation_config.json name the same EOS?"
            )
        if answer.exact and len(answer.tokens) > ask.max_tokens + answer.added:
            raise InputError(
                f"the server gave {len(answer.tokens)} tokens, asked for at most {ask.max_tokens}"
            )

    def _settle(
        self, asked: Sequence[Ask], answers: Sequence[list[Answer]], temperature: float
    ) -> None:
        """Compare some log-probabilities with ours; set those that the server did not give, or
        gave before the temperature, to ours."""
        flat = [(i, answer) for i, found in enumerate(answers) for answer in found]
        given = [pair for pair in flat if pair[1].logprobs is not None]
        lacking = [pair for pair in flat if pair[1].logprobs is None]
        # Spread over all prompts, the same ones in every call of this many.
        step = max(1, len(given) // max(1, self.options.check))
        checked = given[::step][: self.options.check]
        rate = temperature or 1.0
        raw = False
        if checked:
            raw = rate != 1.0 and self._are_raw(asked, checked, rate)
            self._compare(asked, checked, 1.0 if raw else rate)
        if raw:
            lacking = flat
        elif rate != 1.0 and given and not checked and not self.dialect.at_temperature:
            raise InputError(
                "check: 0 answers are compared, and only a comparison tells whether the server's "
                f"log-probabilities are those of temperature {temperature}"
            )
        ours = self._ours(asked, lacking, rate)
        for (_, answer), values in zip(lacking, ours, strict=True):
            answer.logprobs = values

    def _are_raw(
        self, asked: Sequence[Ask], checked: Sequence[tuple[int, Answer]], temperature: float
    ) -> bool:
        """Whether the server's log-probabilities are those of temperature 1, as vLLM's are unless
        it is told otherwise: nearer to ours of temperature 1 than of this one."""

        def gap(at: float) -> float:
            pairs = zip(checked, self._ours(asked, checked, at), strict=True)
            return sum(_largest_gap(answer, ours) for (_, answer), ours in pairs)

        return gap(1.0) < gap(temperature)

    def _compare(
        self, asked: Sequence[Ask], checked: Sequence[tuple[int, Answer]], temperature: float
    ) -> None:
        for (i, answer), ours in zip(checked, self._ours(asked, checked, temperature), strict=True):
            if _largest_gap(answer, ours) <= self.options.tolerance:
                continue
            assert answer.logprobs is not None
            at = max(
                range(len(ours)),
                key=lambda t: abs(_number(answer.logprobs[t]) - ours[t]),  # type: ignore[index]
            )
            raise InputError(
                f"prompt {i}: the server says log-probability {answer.logprobs[at]:.4f} of token "
                f"{at} of its answer ({answer.tokens[at]}), the model here {ours[at]:.4f}: has "
                f"{self.client.url} these weights, and their chat format? (tolerance "
                f"{self.options.tolerance})"
            )

    @torch.no_grad()
    def _ours(
        self, asked: Sequence[Ask], pairs: Sequence[tuple[int, Answer]], temperature: float
    ) -> list[list[float]]:
        """The model's log-probabilities of the answers' tokens, by the path that training takes."""
        if not pairs:
            return []
        device = self.model.output.weight.device
        if device.type == "meta":
            raise InputError("check: the model here has no weights to compare with")
        examples = [
            Example.of(
                asked[i].tokens + answer.tokens,
                [False] * len(asked[i].tokens) + [True] * len(answer.tokens),
            )
            for i, answer in pairs
        ]
        training = self.model.training
        self.model.eval()
        try:
            values: list[float] = []
            for batch in micro_batches(examples, _MICRO_TOKENS):
                moved = batch.to(device)
                logprob = self.model(
                    moved.tokens,
                    moved.positions,
                    moved.cu_seqlens,
                    moved.targets,
                    temperature=temperature,
                )
                values += logprob[moved.targets >= 0].tolist()
        finally:
            self.model.train(training)
        following = iter(values)
        return [list(itertools.islice(following, len(answer.tokens))) for _, answer in pairs]

    def _completion(self, ask: Ask, number: int, answer: Answer) -> Completion:
        ended = answer.tokens[-1] in self.tokenizer.stop_ids
        return Completion(
            prompt_index=number,
            prompt_tokens=ask.tokens,
            text=_text(self.tokenizer, ask, answer.tokens),
            tokens=answer.tokens,
            logprobs=answer.logprobs or [],
            finish_reason="stop" if ended else "length",
        )


def _text(tokenizer: Any, ask: Ask, tokens: list[int]) -> str:
    """As `Engine` gives it."""
    shown = [
        token
        for token in tokens
        if token < tokenizer.vocab_size and token not in tokenizer.stop_ids
    ]
    if isinstance(ask.prompt[0], Mapping):
        return cast(str, tokenizer.decode(shown)).strip()
    before = tokenizer.decode(ask.tokens)
    return cast(str, tokenizer.decode(ask.tokens + shown))[len(before) :]


def _largest_gap(answer: Answer, ours: Sequence[float]) -> float:
    assert answer.logprobs is not None
    return max(abs(_number(a) - b) for a, b in zip(answer.logprobs, ours, strict=True))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _derived(seed: int, index: int) -> int:
    """A seed in [0, 2^31), which every server takes."""
    digest = hashlib.sha256(json.dumps([seed, index]).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
