"""Models instead of people: reward models that are held to be right, a pairwise preference model,
or any language model that is asked."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from llama2rt.annotate.pairs import AnswerPair, Judgement, Side
from llama2rt.data.packing import Example, pack
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.rollout.judge import request
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.scoring import score
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

# The least probability that the chosen answer is the better one, for each rating, best first. The
# paper gives its four ratings no probabilities; these put as many pairs into each as a model that
# is calibrated and unsure of a quarter of all pairs would.
RATING_FROM = {
    "significantly_better": 0.95,
    "better": 0.8,
    "slightly_better": 0.65,
    "negligibly_better": 0.0,
}


def rating(probability: float) -> str:
    """The rating of an answer that is the better one with `probability` in [0.5, 1]."""
    return next(name for name, least in RATING_FROM.items() if probability >= least)


def judgement(first_wins: float) -> Judgement:
    """What an annotator says who holds the first answer for better with this probability."""
    chosen: Side = "first" if first_wins >= 0.5 else "second"
    return Judgement(chosen, rating(max(first_wins, 1 - first_wins)))


class RewardAnnotator:
    """Ranks a pair by the reward model of its kind, and rates it by the Bradley-Terry probability
    of their scores ("gold" reward models, Gao et al. 2023, arXiv 2210.10760). With a safety model,
    in safety batches an answer that it scores below 0 (a probability of 0.5) is unsafe."""

    def __init__(
        self, models: Mapping[str, tuple[ScalarModel, Tokenizer]], micro_tokens: int = 16384
    ) -> None:
        self._models, self._micro_tokens = models, micro_tokens

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        said: list[Judgement | None] = [None] * len(pairs)
        for kind in sorted({pair.prompt.kind for pair in pairs}):
            model, tokenizer = self._models.get(kind, self._models["helpfulness"])
            numbers = [i for i, pair in enumerate(pairs) if pair.prompt.kind == kind]
            answers = [
                (pairs[i].prompt.messages, text)
                for i in numbers
                for text in (pairs[i].first, pairs[i].second)
            ]
            scores = score(model, tokenizer, answers, micro_tokens=self._micro_tokens)
            labelled = kind == "safety" and "safety" in self._models
            for i, (first, second) in zip(numbers, scores.reshape(-1, 2).tolist(), strict=True):
                plain = judgement(1 / (1 + math.exp(-np.clip(first - second, -700, 700))))
                said[i] = Judgement(
                    plain.chosen,
                    plain.rating,
                    first >= 0 if labelled else None,
                    second >= 0 if labelled else None,
                )
        return said


class PreferenceAnnotator:
    """Asks a pairwise preference model, and rates a pair by its probability. A pair that is longer
    than the model's context cannot be decided."""

    def __init__(self, model: PairwiseModel) -> None:
        self._model = model

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        asked = [(pair.prompt.messages, pair.first, pair.second) for pair in pairs]
        return [
            None if math.isnan(first) else judgement(first)
            for first in self._model.first_wins(asked).tolist()
        ]


class JudgeAnnotator:
    """Asks a language model which answer is better, each pair in both orders because judges favour
    a position (section 3.4.2); its probability of "A" against "B" in the two is averaged."""

    def __init__(self, model: Llama, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        messages = [{"role": "user", "content": "A or B?"}]
        begin = len(chat.encode_prompt(tokenizer, messages))
        answers = [chat.encode_response(tokenizer, messages, letter)[0][begin:] for letter in "AB"]
        # A tokenizer that knows neither letter after a space begins both with the space.
        shared = next(i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
        self._begun = answers[0][:shared]
        self._letters = [answer[shared] for answer in answers]

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        return [judgement(self.first_wins(pair)) for pair in pairs]

    def first_wins(self, pair: AnswerPair) -> float:
        """The probability in [0, 1] that the first answer is the better one, over both orders."""
        in_order = self._first_wins(pair, pair.first, pair.second)
        return 0.5 + (in_order - self._first_wins(pair, pair.second, pair.first)) / 2

    @torch.no_grad()
    def _first_wins(self, pair: AnswerPair, first: str, second: str) -> float:
        prompt = pair.prompt
        messages = request(self._tokenizer, prompt.messages, first, second, prompt.kind)
        tokens = [*chat.encode_prompt(self._tokenizer, messages), *self._begun]
        if len(tokens) >= self._model.config.context:
            raise InputError(
                f"annotator.judge: pair {pair.id!r} with its question has {len(tokens)} tokens, "
                f"the judge's context is {self._model.config.context}"
            )
        batch = pack([Example.of(tokens)]).to(next(self._model.parameters()).device)
        logits = self._model.logits(batch.tokens, batch.positions, batch.cu_seqlens)[-1]
        first_logit, second_logit = logits[self._letters].float().tolist()
        return 1 / (1 + math.exp(np.clip(second_logit - first_logit, -700, 700)))
