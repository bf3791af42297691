"""Judges that are models of this project: reward models, preference models, and language models by
their probability of the letters A and B. Their weights are loaded only for what no cache holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama2rt.checkpoint import load
from llama2rt.data.records import Comparison, Messages
from llama2rt.errors import InputError
from llama2rt.evaluate.judges.cache import Cache, Tell, key_of
from llama2rt.evaluate.judges.judging import Question, Verdict
from llama2rt.evaluate.rewardbench.models import Contender, longest
from llama2rt.model import Llama, ScalarModel
from llama2rt.rollout import judge, pairwise
from llama2rt.rollout.scoring import score
from llama2rt.run.manifest import hash_path
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

_MICRO_TOKENS = 16384
_AT_ONCE = 512
"""answers between two writes of the cache"""


class RewardJudge:
    """The answer with the higher score of a reward model is better; on safety prompts by the safety
    model, where there is one. Section 3.3 compares versions by these first."""

    kind, ordered, requests = "reward", False, 0

    def __init__(self, name: str, models: Mapping[str, Path]) -> None:
        """`models`: folders by kind of prompt, helpfulness among them."""
        self.name, self._models = name, dict(models)
        self._hashes: dict[str, str] = {}

    def check(self, questions: Sequence[Question]) -> None:
        """See `Judge`."""
        for kind, folder in self._models.items():
            mine = [q for q in questions if self._model_of(q.kind) == kind]
            _check_fit(Contender("reward", folder, self.name), mine)

    def verdicts(self, questions: Sequence[Question], cache: Cache) -> list[Verdict]:
        """See `Judge`."""
        answers = [(self._model_of(q.kind), q.messages, a) for q in questions for a in _both(q)]
        keys = [key_of("score", self._hash(kind), *answer) for kind, *answer in answers]

        def ask(lacking: Sequence[int], tell: Tell) -> None:
            for kind in self._models:
                mine = [i for i in lacking if answers[i][0] == kind]
                if not mine:
                    continue
                model, tokenizer = _loaded(self._models[kind], ScalarModel)
                for begin in range(0, len(mine), _AT_ONCE):
                    some = mine[begin : begin + _AT_ONCE]
                    items = [answers[i][1:] for i in some]
                    scores = score(model, tokenizer, items, micro_tokens=_MICRO_TOKENS)
                    for i, value in zip(some, scores.tolist(), strict=True):
                        tell(i, {"score": value})

        scores = [said["score"] for said in cache.complete(keys, ask)]
        pairs = zip(scores[::2], scores[1::2], strict=True)
        return [Verdict(0.5 if a == b else float(a > b)) for a, b in pairs]

    def _model_of(self, kind: str) -> str:
        return kind if kind in self._models else "helpfulness"

    def _hash(self, kind: str) -> str:
        if kind not in self._hashes:
            self._hashes[kind] = hash_path(self._models[kind])
        return self._hashes[kind]


class LetterJudge:
    """A language model's probability of the letter A against B after a question: a preference
    model's (the stage preference), or that of any chat model by prompt."""

    ordered, requests = True, 0

    def __init__(self, name: str, folder: Path, *, preference: bool) -> None:
        self.name, self._folder = name, folder
        self.kind = "preference" if preference else "model"
        self._hash: str | None = None

    def _identity(self) -> Any:
        if self._hash is None:
            self._hash = hash_path(self._folder)
        prompt = None if self.kind == "preference" else [judge.QUESTION, judge.QUALITY]
        return {self.kind: self._hash, "prompt": prompt}

    def check(self, questions: Sequence[Question]) -> None:
        """See `Judge`."""
        kind = "preference" if self.kind == "preference" else "judge"
        _check_fit(Contender(kind, self._folder, self.name), questions)  # type: ignore[arg-type]

    def verdicts(self, questions: Sequence[Question], cache: Cache) -> list[Verdict]:
        """See `Judge`."""
        who = self._identity()
        keys = [key_of("first", who, vars(question)) for question in questions]

        def ask(lacking: Sequence[int], tell: Tell) -> None:
            model, tokenizer = _loaded(self._folder, Llama)
            letters = pairwise.Letters.of(tokenizer)
            for begin in range(0, len(lacking), _AT_ONCE):
                some = lacking[begin : begin + _AT_ONCE]
                tokens = [self._encode(tokenizer, letters, questions[i]) for i in some]
                found = pairwise.probability_of_first(model, letters, tokens, _MICRO_TOKENS)
                for i, read, first in zip(some, tokens, found.tolist(), strict=True):
                    tell(i, {"first": first, "prompt_tokens": len(read)})

        return [Verdict(**said) for said in cache.complete(keys, ask)]

    def _encode(
        self, tokenizer: Tokenizer, letters: pairwise.Letters, question: Question
    ) -> list[int]:
        if self.kind == "preference":
            pair = (question.messages, question.first, question.second)
            return pairwise.encode(tokenizer, letters, pair)
        asked = judge.request(tokenizer, *vars(question).values())
        return [*chat.encode_prompt(tokenizer, asked), *letters.begun]


def _both(question: Question) -> tuple[str, str]:
    return question.first, question.second


def _check_fit(contender: Contender, questions: Sequence[Question]) -> None:
    """InputError for a model of another kind, and for a question beyond its context."""
    pairs = [Comparison(q.messages, q.first, q.second, kind=q.kind) for q in questions]
    lengths, context = longest(contender, pairs)
    if lengths and max(lengths) > context:
        messages: Messages = questions[lengths.index(max(lengths))].messages
        raise InputError(
            f"{contender.folder}: the answers to the prompt that begins "
            f"{messages[0]['content'][:60]!r} take {max(lengths)} tokens to judge, the model's "
            f"context is {context}"
        )


def _loaded(folder: Path, expected: type[ScalarModel] | type[Llama]) -> tuple[Any, Tokenizer]:
    model, tokenizer = load(folder, "cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(model, expected) and tokenizer is not None  # `_check_fit`
    return model.requires_grad_(False).eval(), tokenizer
