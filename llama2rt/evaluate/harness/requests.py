"""Tokens of what the harness asks: continuations behind contexts, whole texts, prompts to answer.

The rules are those of its own Hugging Face backend (lm-eval 0.4.13, models/huggingface.py), which
published figures come from, so that numbers compare; where that backend fails, ours does not
(`Encoder.pair`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2rt.errors import InputError, naming
from llama2rt.generate.request import SamplingOptions
from llama2rt.text import chat
from llama2rt.text.template import ChatTemplate
from llama2rt.text.tokenizer import Tokenizer

MOST_NEW_TOKENS = 256
"""of an answer whose task gives no limit: the harness's default"""

# The names under which tasks give that limit, the first that is there counts: the harness's order.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FILTERS = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Scored:
    """Tokens of which the last `count` are to be predicted, each from all before it."""

    tokens: np.ndarray
    """int32 [n], what is predicted included"""
    count: int

    def last(self, context: int) -> "Scored":
        """Without the first tokens that a model of so much context cannot read."""
        return Scored(self.tokens[-(context + 1) :], min(self.count, context))


class Encoder:
    """A tokenizer as the harness uses one.

    `add_bos_token`: BOS begins each context, as LLaMA's tokenizers do by themselves. A text that
    begins with BOS in writing, as chat templates write it, is parsed and gets no second one.
    """

    def __init__(self, tokenizer: Tokenizer, *, add_bos_token: bool = True) -> None:
        self.tokenizer, self.add_bos_token = tokenizer, add_bos_token
        self._written_bos = tokenizer.special_names["bos_token"]
        twice = tokenizer.encode("a") * 2
        once = tokenizer.decode(twice[: len(twice) // 2])
        self._drops_space = tokenizer.decode(twice) != once + once
        self._chats: dict[str, chat.Messages] = {}

    def text(self, text: str) -> list[int]:
        """Ids of a text, from BOS on."""
        if text.startswith(self._written_bos):
            return self.tokenizer.encode_rendered(text)[0]
        return self.tokenizer.encode(text, bos=self.add_bos_token)

    def pair(self, context: str, continuation: str) -> Scored:
        """A continuation to be scored behind its context.

        White space at the context's end counts as the continuation's, which is what the tokens of
        both texts together have behind as many as the context has alone; they follow those of the
        context alone (the harness's `_encode_pair`, kept for equal numbers: where the two meet
        within a token, text is lost). Where none is left, that backend fails; here the token on the
        boundary is scored. InputError where a continuation has no token.
        """
        if context in self._chats:
            ids, trainable = chat.encode_response(
                self.tokenizer, self._chats[context], continuation
            )
            begin = trainable.index(True)
            return Scored(np.array(ids[:-1], np.int32), len(ids) - 1 - begin)  # without EOS
        if not context:
            ids = self.tokenizer.encode(continuation)
            if ids and ids[0] != self.tokenizer.bos:
                ids = [self.tokenizer.bos, *ids]
            alone = 1
        else:
            ids = self.text(context + continuation)
            before = self.text(context.rstrip())
            if len(ids) > len(before) > 0:
                ids, alone = before + ids[len(before) :], len(before)
            else:
                alone = max(1, _alike(ids, before))
        if len(ids) <= alone:
            raise InputError(f"a continuation without tokens: {continuation!r}")
        return Scored(np.array(ids, np.int32), len(ids) - alone)

    def windows(self, text: str, context: int) -> list[Scored]:
        """A whole text in windows of at most `context` tokens, each token predicted once and from
        as much as fits (the harness's rolling windows).

        With `add_bos_token` that backend puts a BOS before the text's own and scores that one too;
        so does this, for equal numbers.
        """
        ids = np.array([self.tokenizer.bos, *self.text(text)], np.int32)
        found = [Scored(ids[: context + 1], min(context, len(ids) - 1))]
        done = found[0].count + 1
        while done < len(ids):
            end = min(done + context, len(ids))
            found.append(Scored(ids[end - context - 1 : end], end - done))
            done = end
        return found if len(ids) > 1 else []

    def is_chat(self, text: str) -> bool:
        """Whether `render` has written the text."""
        return text in self._chats

    def prompt(self, text: str, most: int) -> list[int]:
        """Ids of a prompt to be answered, its last `most`."""
        if text in self._chats:
            return chat.encode_prompt(self.tokenizer, self._chats[text])[-most:]
        return self.text(text)[-most:]

    def answer(self, text: str) -> str:
        """What the harness takes for an answer: its tokens decoded alone, where SentencePiece drops
        the space in front; `text` continues the prompt's."""
        return text.removeprefix(" ") if self._drops_space else text

    @property
    def template(self) -> ChatTemplate:
        """The folder's, or Llama-2-Chat's, in which models without one are trained here."""
        names = tuple(self.tokenizer.special_names.items())
        return self.tokenizer.template or ChatTemplate(chat.HUGGING_FACE_TEMPLATE, names)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A dialogue as the text that stands for it in the harness's requests; its tokens are then
        those of training and sampling (`text.chat`). InputError as `chat.encode_prompt`."""
        chat.encode_prompt(self.tokenizer, messages)
        text = self.template.render(messages, add_generation_prompt=True)
        self._chats[text] = [dict(message) for message in messages]
        return text


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are the same."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def sampling_options(given: Mapping[str, Any], seed: int) -> SamplingOptions:
    """A task's `generation_kwargs`. Greedy without `do_sample` and without a temperature, as in the
    harness. InputError naming a key that the sampler has not."""
    options = dict(given)
    limits = [options.pop(name) for name in _LIMITS if name in options]
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(options.pop("temperature", 0.0) or 0.0)
    do_sample = options.pop("do_sample", None)
    if do_sample is False:
        temperature = 0.0
    elif do_sample and not temperature:
        temperature = 1.0  # as transformers samples where a task gives none
    if unknown := sorted(set(options) - set(_FILTERS)):
        raise InputError(
            f"generation_kwargs: {', '.join(unknown)}: not known; expected until, do_sample, "
            f"temperature, {', '.join((*_FILTERS, _LIMITS[0]))}"
        )
    with naming("generation_kwargs"):
        return SamplingOptions(
            temperature=temperature,
            stop=tuple(text for text in until if text),
            max_tokens=int(limits[0]) if limits else MOST_NEW_TOKENS,
            seed=seed,
            **options,
        )
