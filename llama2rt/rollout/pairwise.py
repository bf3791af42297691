"""The pairwise preference model: a language model that reads two responses and says A or B.

Text-to-text (RLHF Workflow, arXiv 2405.07863, section 2): the context and both responses stand in
one user's turn, in the chat format, and the answer is the letter of the better one. P(first is
better) is the model's probability of its letter against the other one's, averaged over both orders,
because models favour a position. The layout is that of RLHFlow's published preference models.

A response may hold anything a policy said. Where it holds a marker of this layout, a tag of the
chat format or a control token, it gets a space inside, so that no text can end its own part and
speak as another.
"""

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from llama2rt.data.loader import dealt
from llama2rt.data.packing import Batch, Example, filler, micro_batches
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.parallel import Mesh, faults
from llama2rt.rollout.frozen import phase, shared_over
from llama2rt.rollout.ranking import Match, Ranking, rank
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.rollout.pairwise")

MARKERS = ("[CONTEXT]", "[RESPONSE A]", "[RESPONSE B]", "<turn>")
Pair = tuple[chat.Messages, str, str]
"""(the turns before the response, a response, another one)"""


def question(tokenizer: Tokenizer, messages: chat.Messages, first: str, second: str) -> str:
    """What the user's turn says of a pair, `first` as A."""
    markers = (*MARKERS, *markers_of_format(tokenizer))
    turns = "".join(
        f"\n<turn> {message['role']}\n {without(markers, message['content'])}"
        for message in messages
    )
    first, second = without(markers, first), without(markers, second)
    return f"[CONTEXT] \n{turns}\n [RESPONSE A] {first} [RESPONSE B] {second} \n"


def markers_of_format(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Tags and control tokens of the chat format, which no message may hold."""
    return (*chat.TAGS, *tokenizer.template_tokens)


def without(markers: Sequence[str], text: str) -> str:
    """`text` with a space after the first character of each marker that it holds. One that has
    spaces there already gets another, so that different texts stay different."""
    return _pattern(tuple(markers)).sub(lambda found: f"{found[0]} ", text)


@functools.lru_cache(maxsize=16)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    # Looking ahead, so that one of two markers that overlap does not hide the other.
    each = (f"{re.escape(m[0])}(?= *{re.escape(m[1:])})" for m in markers if len(m) > 1)
    return re.compile("|".join(each))


@dataclass(frozen=True)
class Letters:
    """How a tokenizer writes the answers A and B."""

    begun: tuple[int, ...]
    """tokens that both begin with: of a space, where no piece holds it with its letter"""
    first: int
    """the token that says A"""
    second: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Letters":
        """InputError where it writes both alike."""
        messages = [{"role": "user", "content": "A or B?"}]
        begin = len(chat.encode_prompt(tokenizer, messages))
        a, b = (chat.encode_response(tokenizer, messages, letter)[0][begin:] for letter in "AB")
        for i, (first, second) in enumerate(zip(a, b, strict=False)):
            if first != second:
                return cls(tuple(a[:i]), first, second)
        raise InputError("the tokenizer writes the answers A and B alike")


def encode(tokenizer: Tokenizer, letters: Letters, pair: Pair) -> list[int]:
    """Tokens up to the letter, the pair's first response shown as A."""
    asked = [{"role": "user", "content": question(tokenizer, *pair)}]
    return [*chat.encode_prompt(tokenizer, asked), *letters.begun]


def swapped(pair: Pair) -> Pair:
    """The same pair in the other order."""
    messages, first, second = pair
    return messages, second, first


@phase
@torch.no_grad()
def probability_of_first(
    model: nn.Module,
    letters: Letters,
    sequences: Sequence[list[int]],
    micro_tokens: int,
    packed: Callable[[Sequence[Example]], Batch] = pack_shared,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """P(A) against B at the end of each of `sequences` (`encode`) -> fp64 [n].

    Sequences share micro-batches of at most `micro_tokens` tokens, and what they begin with alike
    is computed once where `packed` shares it. The ranks of `mesh` read a part each, and all have
    all of it. FloatingPointError for weights that give no finite number.
    """
    mesh = mesh or Mesh.single()
    # Sorted, pairs of one context, and of one response A, are neighbours.
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    examples = [
        Example.of(tokens, np.arange(len(tokens)) == len(tokens) - 1)
        for i in order
        for tokens in ([*sequences[i], letters.first], [*sequences[i], letters.second])
    ]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = torch.zeros(len(examples), device=device)
    try:
        micros = micro_batches(examples, micro_tokens, packed)
        begins = np.cumsum([0, *(micro.weight for micro in micros)]).tolist()
        numbered = zip(begins, micros, strict=False)
        for begin, micro in dealt(numbered, mesh.share, (len(examples), filler())):
            faults.moved()
            batch = micro.to(device)
            layout = batch.tokens, batch.positions, batch.cu_seqlens, batch.targets
            logprob = model(*layout, keys=batch.keys, tails=batch.tails)
            found[begin : begin + micro.weight] = logprob[batch.targets >= 0].float()
    finally:
        model.train(training)
    # Each rank has zeros where others have read.
    both = mesh.sum(found).cpu().double().view(-1, 2)
    if not both.isfinite().all():
        raise FloatingPointError("the preference model's answers are not finite: damaged weights")
    result = np.empty(len(sequences))
    result[order] = (both[:, 0] - both[:, 1]).sigmoid().numpy()
    return result


class PairwiseModel:
    """A trained preference model that compares responses as text, whoever's tokenizer wrote them.

    A response that the length limit cut is compared as it stands; the model is not told so.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, micro_tokens: int = 16384) -> None:
        self.model, self.tokenizer, self._micro_tokens = model, tokenizer, micro_tokens
        self._letters = Letters.of(tokenizer)

    def length(self, messages: chat.Messages) -> int:
        """Tokens of a pair of empty responses to `messages`."""
        return len(encode(self.tokenizer, self._letters, (messages, "", "")))

    def probabilities(self, pairs: Sequence[Pair]) -> np.ndarray:
        """P(the first response is better) with it shown as A, and shown as B -> fp64 [n, 2]; NaN
        where a pair is longer than the model's context."""
        result = np.full((len(pairs), 2), np.nan)
        asked = [
            [encode(self.tokenizer, self._letters, order) for order in (pair, swapped(pair))]
            for pair in pairs
        ]
        longest = self.model.config.context - 1  # the letter follows
        fitting = [i for i, both in enumerate(asked) if max(map(len, both)) <= longest]
        first = probability_of_first(
            self.model,
            self._letters,
            [tokens for i in fitting for tokens in asked[i]],
            self._micro_tokens,
            mesh=shared_over(self.model),
        ).reshape(-1, 2)
        result[fitting] = np.stack([first[:, 0], 1 - first[:, 1]], axis=1)
        return result

    def first_wins(self, pairs: Sequence[Pair]) -> np.ndarray:
        """P(the first response is better) -> fp64 [n], the mean of both orders; 0.5 for equal
        texts, NaN for a pair beyond the context."""
        result = np.full(len(pairs), 0.5)
        different = [i for i, (_, first, second) in enumerate(pairs) if first != second]
        result[different] = self.probabilities([pairs[i] for i in different]).mean(axis=1)
        return result

    def rank(
        self, groups: Sequence[tuple[chat.Messages, Sequence[str]]], how: Ranking
    ) -> list[np.ndarray]:
        """Of each prompt's responses, their `ranking.rank` -> fp64 [n] each. A pair beyond the
        context counts as undecided, and is said."""
        undecided = compared = 0

        def compare(matches: Sequence[Match]) -> np.ndarray:
            nonlocal undecided, compared
            found = self.first_wins(
                [(groups[g][0], groups[g][1][a], groups[g][1][b]) for g, a, b in matches]
            )
            undecided += int(np.isnan(found).sum())
            compared += len(matches)
            return np.nan_to_num(found, nan=0.5)

        standings = rank([len(texts) for _, texts in groups], compare, how)
        if undecided:
            logger.warning(
                "%d of %d pairs beyond the preference model's context of %d count as undecided",
                undecided,
                compared,
                self.model.config.context,
            )
        return standings
