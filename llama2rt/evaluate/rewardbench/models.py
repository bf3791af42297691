"""Who ranks RewardBench's pairs: a reward model, a pairwise preference model, or a judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llama2rt.checkpoint import load
from llama2rt.data.records import Comparison
from llama2rt.errors import InputError, naming
from llama2rt.generate import Engine
from llama2rt.model import Llama, ScalarModel
from llama2rt.rollout import judge, pairwise
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.scoring import score
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

Kind = Literal["reward", "preference", "judge"]
MODEL_TYPES: dict[Kind, str] = {
    "reward": "Seq. Classifier",
    "preference": "Custom Classifier",
    "judge": "Generative",
}
"""as the `rewardbench` package calls them"""
TIES: dict[Kind, float] = {"reward": 0.0, "preference": 0.5, "judge": 0.5}
"""what a tie counts: nothing between two scores, as in the package; half where the model has said
that it cannot tell (there too, for what generates)"""


@dataclass(frozen=True)
class Contender:
    """A model folder and what it is."""

    kind: Kind
    folder: Path
    name: str


@dataclass(frozen=True)
class Ranked:
    """What a model said of n pairs."""

    chosen: np.ndarray
    """fp64 [n]: scores, or probabilities of being the better one"""
    rejected: np.ndarray
    both_orders: np.ndarray | None = None
    """fp64 [n, 2]: P(chosen is better), shown first and shown second; None for scores"""

    def results(self, kind: Kind) -> np.ndarray:
        """fp64 [n]: 1 where the chosen answer is ahead."""
        return np.where(self.chosen == self.rejected, TIES[kind], self.chosen > self.rejected)


def contenders(
    reward: Sequence[Path], preference: Sequence[Path], judges: Sequence[Path]
) -> list[Contender]:
    """Each model under a name of its own: of its run's directory, or of the folder itself. With a
    number behind it where two are called alike."""
    given: list[tuple[Kind, Path]] = [
        *(("reward", folder) for folder in reward),
        *(("preference", folder) for folder in preference),
        *(("judge", folder) for folder in judges),
    ]
    taken: set[str] = set()
    found = []
    for kind, folder in given:
        whole = folder.resolve()
        base = name = whole.parent.name if whole.name == "model" else whole.name
        number = 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        found.append(Contender(kind, folder, name))
    return found


def longest(contender: Contender, comparisons: Sequence[Comparison]) -> tuple[list[int], int]:
    """(tokens that the model would read of each comparison at once, its context), without its
    weights. InputError for a model of another kind, and for one without a tokenizer."""
    model, tokenizer = load(contender.folder, "meta")
    expected = "reward" if contender.kind == "reward" else "language"
    if isinstance(model, ScalarModel) != (expected == "reward"):
        found = "language" if expected == "reward" else "reward"
        raise InputError(f"{contender.folder}: expected a {expected} model, found a {found} model")
    if tokenizer is None:
        raise InputError(f"{contender.folder}: holds no tokenizer")
    lengths = []
    for comparison in comparisons:
        with naming(f"prompt that begins {comparison.prompt[0]['content'][:60]!r}"):
            lengths.append(_length(contender.kind, tokenizer, comparison))
    return lengths, model.config.context


def _length(kind: Kind, tokenizer: Tokenizer, comparison: Comparison) -> int:
    pair = (comparison.prompt, comparison.chosen, comparison.rejected)
    if kind == "reward":
        return max(
            len(chat.encode_response(tokenizer, comparison.prompt, text)[0])
            for text in (comparison.chosen, comparison.rejected)
        )
    if kind == "preference":
        letters = pairwise.Letters.of(tokenizer)
        orders = (pair, pairwise.swapped(pair))
        return 1 + max(len(pairwise.encode(tokenizer, letters, order)) for order in orders)
    asked = judge.requests(tokenizer, pair)
    return judge.REPLY_TOKENS + max(len(chat.encode_prompt(tokenizer, m)) for m in asked)


def ranked(
    contender: Contender, comparisons: Sequence[Comparison], device: str, micro_tokens: int
) -> Ranked:
    """What the model says of `comparisons`, loaded for it in fp32 on `device`."""
    model, tokenizer = load(contender.folder, device)
    assert tokenizer is not None  # `longest`
    model = model.requires_grad_(False).eval()
    if isinstance(model, ScalarModel):
        items = [(c.prompt, text) for c in comparisons for text in (c.chosen, c.rejected)]
        scores = score(model, tokenizer, items, micro_tokens=micro_tokens).astype(np.float64)
        return Ranked(scores[::2], scores[1::2])
    assert isinstance(model, Llama)
    pairs = [(c.prompt, c.chosen, c.rejected) for c in comparisons]
    if contender.kind == "preference":
        both = PairwiseModel(model, tokenizer, micro_tokens).probabilities(pairs)
    else:
        both = judge.votes(Engine(model, tokenizer), pairs)
    mean = both.mean(axis=1)
    return Ranked(mean, 1 - mean, both)
