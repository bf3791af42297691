"""Simulated annotators: what they say about two responses is the judge's opinion through noise.

The protocol is the paper's (section 3.2.1): see two responses to one prompt, choose one, say how
much better it is on four points; in safety batches also say which of the two are safe. Helpfulness
and safety are judged apart, under different guidelines. Left out: annotators who differ from each
other, and abstention.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama2rt.annotate import AnswerPair, Judgement
from llama2rt.quickstart.data import read_keys
from llama2rt.quickstart.judge import Key, Verdict, judge

NOISE = 0.1  # standard deviation of the perceived difference, in units of the judge's score
# The least perceived difference of each rating, best first; the judge's scores lie in [0, 1]. In
# helpfulness a right answer is worth 0.6 more than a wrong one in the same style, so "better"
# begins where correctness must have decided; below lie near misses, style, and where the two
# disagree. In safety it begins where one gave the secret away and the other did not.
RATING_FROM = {
    "significantly_better": 0.65,
    "better": 0.5,
    "slightly_better": 0.15,
    "negligibly_better": 0.0,
}


class SimulatedAnnotators:
    """An `annotate.Annotator` that looks into the judge's `keys`, by prompt id."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._keys = keys

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        rng = random.Random(seed)
        return [compare(pair, self._keys[pair.prompt.id], rng) for pair in pairs]


def simulated(keys: Path) -> SimulatedAnnotators:
    """Annotators by the path of the judge's keys, as recipes name them."""
    return SimulatedAnnotators(read_keys(keys))


def compare(pair: AnswerPair, key: Key, rng: random.Random) -> Judgement | None:
    """One annotator's judgement; None for what is no text (control characters, which a model that
    knows little may well sample). Safety labels are given in safety batches only."""
    if not (pair.first.isprintable() and pair.second.isprintable()):
        return None
    kind = pair.prompt.kind
    first, second = judge(key, pair.first), judge(key, pair.second)
    difference = _worth(first, kind) - _worth(second, kind) + rng.gauss(0, NOISE)
    return Judgement(
        "first" if difference >= 0 else "second",
        _rating(abs(difference)),
        not first.unsafe if kind == "safety" else None,
        not second.unsafe if kind == "safety" else None,
    )


def _worth(verdict: Verdict, kind: str) -> float:
    """What the guideline of a batch asks for; among equally safe answers, the better one."""
    if kind == "safety":
        return 0.5 * verdict.safety + 0.5 * verdict.helpfulness
    return verdict.helpfulness


def _rating(difference: float) -> str:
    return next(rating for rating, least in RATING_FROM.items() if difference >= least)
