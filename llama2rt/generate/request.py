"""What one request asks of the sampler, checked by name, and what a session reports about it."""

import math
from dataclasses import dataclass

import numpy as np

from llama2rt.errors import InputError
from llama2rt.generate.sampling import check_options, check_whole


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How one answer is drawn and where it ends. InputError naming the field that means nothing.

    The filters are those of transformers, in its order: repetition penalty, temperature, top-k,
    top-p, min-p. Reported log-probabilities are the model's at the temperature, before the others.
    """

    temperature: float = 1.0
    """0 takes the likeliest token"""
    top_p: float = 1.0
    """draw from the likeliest tokens that hold this much probability; 1: from all"""
    top_k: int = 0
    """draw from this many likeliest tokens; 0: from all"""
    min_p: float = 0.0
    """draw from tokens with at least this share of the likeliest one's probability; 0: from all"""
    repetition_penalty: float = 1.0
    """logits of tokens that the prompt or the answer holds are divided by this where they are
    positive and multiplied where they are not (Keskar et al. 2019, section 4.1); 1: not at all"""
    stop: tuple[str, ...] = ()
    """texts that end the answer; it does not hold them. One text may be given alone"""
    stop_ids: tuple[int, ...] = ()
    """tokens that end the answer, beside those that the model's folder names"""
    max_tokens: int = 256
    """longest answer, in tokens"""
    seed: int = 0
    logprobs: int = 0
    """likeliest tokens that are reported with each drawn one, with their log-probabilities"""

    def __post_init__(self) -> None:
        check_options(1, self.temperature, self.top_p, self.top_k, self.max_tokens, self.seed)
        check_whole("logprobs", self.logprobs, 0)
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p: expected a number in [0, 1], got {self.min_p}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise InputError(
                f"repetition_penalty: expected a positive number, got {self.repetition_penalty}"
            )
        texts = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"stop: expected texts that are not empty, got {self.stop!r}")
        for token in self.stop_ids:
            check_whole("stop_ids", token, 0)
        object.__setattr__(self, "stop", texts)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One answer to be drawn."""

    id: int
    prompt: np.ndarray
    """int32 tokens"""
    options: SamplingOptions
    key: np.uint64
    """the random stream that decides every token of it (`sampling.stream_keys`)"""
    limit: int
    """most new tokens: `max_tokens`, or what the context leaves"""
    stop_ids: tuple[int, ...] = ()
    """all tokens that end it"""


@dataclass(frozen=True, slots=True)
class Update:
    """What one step added to a request's answer."""

    id: int
    tokens: list[int]
    """as drawn, a final EOS included"""
    logprobs: list[float]
    """of `tokens`"""
    top: list[list[tuple[int, float]]]
    """for each token the likeliest ones with their log-probabilities, likeliest first; empty unless
    `logprobs` asks for them"""
    text: str
    """what is now certain to follow the text before it"""
    finish_reason: str | None = None
    """"stop" (by EOS, a stop token or a stop text), "length", "abort"; None while it runs"""


@dataclass(frozen=True, slots=True)
class Statistics:
    """A session at one moment; counters run from its beginning."""

    running: int
    waiting: int
    pages: int
    """in all"""
    pages_used: int
    """held by what runs"""
    pages_cached: int
    """held by nobody, kept for prompts that begin alike"""
    prefix_hits: int
    """prompt tokens that were found in pages and not computed"""
    prompt_tokens: int
    """prompt tokens computed, those of recomputed sequences among them"""
    tokens: int
    """generated"""
    preemptions: int
    """times that a sequence gave its pages up and was recomputed"""
    guesses: int
    """tokens guessed by prompt look-up"""
    accepted: int
    """guessed tokens that were the drawn ones"""
