"""Whatever can be asked which of two answers is better, behind one interface: our reward models,
pairwise preference models, sequence classifiers of transformers, a language model that is asked
(Llama 2, Table 7).

Each is checked without its weights before a study begins, and loads them when it is first asked.
What one cannot read, such as a pair beyond its context, scores NaN.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama2rt.annotate.models import JudgeAnnotator
from llama2rt.annotate.pairs import AnswerPair
from llama2rt.data.records import Comparison, Prompt
from llama2rt.errors import InputError
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.scoring import score_tokens
from llama2rt.stages import loading
from llama2rt.text import chat

logger = logging.getLogger("llama2rt.pipeline.scorers")

Item = tuple[chat.Messages, str]
"""The turns before an answer, and the answer."""


class Scorer:
    """Base of all that score single answers."""

    scores_answers = True
    """False of what can only compare two"""

    def __init__(self, folder: Path, micro_tokens: int) -> None:
        self.folder, self.micro_tokens = folder, micro_tokens

    def check(self) -> None:
        """InputError, without reading weights, where the folder is no such model."""
        raise NotImplementedError

    def answers(self, items: Sequence[Item]) -> np.ndarray:
        """Raw scores fp32 [n], comparable between answers to one prompt; NaN where it cannot read
        an answer. InputError, with the reason, where it can read none."""
        raise NotImplementedError

    def pairs(self, comparisons: Sequence[Comparison]) -> tuple[np.ndarray, np.ndarray]:
        """Raw scores fp32 [n] of the chosen and of the rejected side; as `answers`."""
        items = [
            (pair.prompt, text) for pair in comparisons for text in (pair.chosen, pair.rejected)
        ]
        chosen, rejected = self.answers(items).reshape(-1, 2).T
        return chosen, rejected

    def release(self) -> None:
        """Let the weights go until it is asked again."""
        vars(self).pop("_loaded", None)

    def _each(self, count: int, read: Callable[[int], float]) -> np.ndarray:
        """fp32 [count] of what `read` gives, NaN where it refuses; InputError where it refuses all,
        which would otherwise look like bad pairs."""
        found = np.full(count, np.nan, np.float32)
        refused = ""
        for i in range(count):
            try:
                found[i] = read(i)
            except InputError as error:
                refused = str(error)
        if count and refused and not np.isfinite(found).any():
            raise InputError(f"{self.folder}: cannot read any of {count}: {refused}")
        return found


class RewardModel(Scorer):
    """One of ours: the score at the last token of the finished answer (section 3.2.2)."""

    def check(self) -> None:
        outline = loading.outline(self.folder)
        if not outline.scalar:
            raise InputError(f"{self.folder}: expected a reward model, found a language model")
        if outline.tokenizer is None:
            raise InputError(f"{self.folder}: holds no tokenizer")

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        tokenizer = loading.outline(self.folder).tokenizer
        return loading.load_scalar(self.folder), tokenizer

    def answers(self, items: Sequence[Item]) -> np.ndarray:
        model, tokenizer = self._loaded
        sequences: list[list[int]] = []

        def read(i: int) -> float:
            tokens = chat.encode_response(tokenizer, *items[i])[0]
            if len(tokens) > model.config.context:
                raise InputError(f"{len(tokens)} tokens, its context is {model.config.context}")
            sequences.append(tokens)
            return 0.0

        found = self._each(len(items), read)
        scores = score_tokens(model, sequences, micro_tokens=self.micro_tokens)
        found[np.isfinite(found)] = scores
        return found


class Classifier(Scorer):
    """A folder of transformers' for sequence classification: its one output is the score; of two
    (no, yes), the log-odds of the second. The dialogue is written in the tokenizer's chat template;
    without one, prompt and answer are encoded as a pair of texts, as reward models on encoders are
    trained. One sequence at a time: in a batch, padding would decide which token is read."""

    def check(self) -> None:
        transformers = _transformers()
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
            transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(f"{self.folder}: transformers cannot read it: {first}") from None
        names = config.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in names):
            said = ", ".join(names) or "no class"
            raise InputError(
                f"{self.folder}: expected a model for sequence classification, its config names "
                f"{said}"
            )
        if config.num_labels not in (1, 2):
            raise InputError(
                f"{self.folder}: expected one output (a score) or two (no, yes), got "
                f"{config.num_labels}"
            )

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, int]:
        transformers = _transformers()
        model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        # A head that is not in the folder would be drawn at random, with a warning.
        if missing := sorted(found["missing_keys"]):
            raise InputError(f"{self.folder}: lacks weights: {', '.join(missing[:3])}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        longest = (
            getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        )
        return (
            model.to(loading.default_device()).eval(),
            tokenizer,
            min(longest, tokenizer.model_max_length),
        )

    @torch.no_grad()
    def answers(self, items: Sequence[Item]) -> np.ndarray:
        model, _, longest = self._loaded

        def read(i: int) -> float:
            encoded = self._encoded(*items[i])
            length = encoded["input_ids"].shape[1]
            if length > longest:
                raise InputError(f"{length} tokens, it takes {longest}")
            logits = model(**encoded.to(model.device)).logits[0].double()
            return float(logits[0] if len(logits) == 1 else logits[1] - logits[0])

        found = self._each(len(items), read)
        if np.isinf(found).any():
            raise FloatingPointError(f"{self.folder}: scores are not finite: damaged weights")
        return found

    def _encoded(self, messages: chat.Messages, response: str) -> Any:
        _, tokenizer, _ = self._loaded
        if tokenizer.chat_template:
            answered = [*messages, {"role": "assistant", "content": response}]
            return tokenizer.apply_chat_template(
                answered, tokenize=True, return_dict=True, return_tensors="pt"
            )
        prompt = "\n\n".join(message["content"] for message in messages)
        return tokenizer(prompt, response, return_tensors="pt")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError(
            "classifier: wants transformers, which is not installed: pip install transformers"
        ) from None
    return transformers


class Judge(Scorer):
    """A language model that is asked which of two answers is better, in both orders (section
    3.4.2). The log-odds of its probability stand as the chosen side's score against 0."""

    scores_answers = False

    def check(self) -> None:
        outline = loading.outline(self.folder)
        if outline.scalar:
            raise InputError(f"{self.folder}: expected a language model, found a reward model")
        if outline.tokenizer is None:
            raise InputError(f"{self.folder}: holds no tokenizer")

    @functools.cached_property
    def _loaded(self) -> Any:
        model, tokenizer = loading.load_llama(self.folder)
        return JudgeAnnotator(model.requires_grad_(False).eval(), tokenizer)

    def pairs(self, comparisons: Sequence[Comparison]) -> tuple[np.ndarray, np.ndarray]:
        def read(i: int) -> float:
            pair = comparisons[i]
            asked = Prompt(str(i), pair.prompt, pair.kind)
            wins = self._loaded.first_wins(AnswerPair(str(i), asked, pair.chosen, pair.rejected))
            return log_odds(wins)

        return against_zero(self._each(len(comparisons), read))


class PreferenceModel(Judge):
    """A model of the preference stage (RLHF Workflow, section 2), which reads two answers at once:
    as a judge's, the log-odds of its probability over both orders."""

    @functools.cached_property
    def _loaded(self) -> Any:
        model, tokenizer = loading.load_llama(self.folder)
        return PairwiseModel(model.requires_grad_(False).eval(), tokenizer, self.micro_tokens)

    def pairs(self, comparisons: Sequence[Comparison]) -> tuple[np.ndarray, np.ndarray]:
        asked = [(pair.prompt, pair.chosen, pair.rejected) for pair in comparisons]
        wins = self._loaded.first_wins(asked)

        def read(i: int) -> float:
            if math.isnan(wins[i]):
                raise InputError(f"its context is {self._loaded.model.config.context}")
            return log_odds(wins[i])

        return against_zero(self._each(len(comparisons), read))


def log_odds(probability: float) -> float:
    """Those of a probability that rounds to 0 or 1 are as long as fp64 can hold."""
    bounded = min(max(probability, 1e-15), 1 - 1e-15)
    return math.log(bounded / (1 - bounded))


def against_zero(odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As scores of both sides."""
    return odds, np.where(np.isfinite(odds), 0, np.nan).astype(np.float32)


BASELINES: dict[str, type[Scorer]] = {
    "trained": RewardModel,
    "classifier": Classifier,
    "preference": PreferenceModel,
    "judge": Judge,
}
"""By the key under which a study names a model that it does not train."""
