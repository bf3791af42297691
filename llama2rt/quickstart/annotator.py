"""Simulated annotators: what they say about two responses is the judge's opinion through noise.

The protocol is the paper's (section 3.2.1): see two responses to one prompt, choose one, say how
much better it is on four points; in safety batches also say which of the two are safe. Helpfulness
and safety are judged apart, under different guidelines. Left out: annotators who differ from each
other, and abstention.
"""

from __future__ import annotations

import random

from llama2rt.data.records import Comparison
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


def compare(
    messages: list[dict[str, str]],
    key: Key,
    first: str,
    second: str,
    kind: str,
    rng: random.Random,
) -> Comparison | None:
    """One annotator's comparison of two responses to `messages`; None where it is not used.

    Not used are identical responses, what is no text (nothing, or control characters, which a model
    that knows little may well sample) and, as in the paper, pairs in which the chosen response is
    unsafe and the other safe. A safety label is given in safety batches only.
    """
    first, second = first.strip(), second.strip()
    if first == second or not (first.isprintable() and second.isprintable() and first and second):
        return None
    verdicts = judge(key, first), judge(key, second)
    difference = _worth(verdicts[0], kind) - _worth(verdicts[1], kind) + rng.gauss(0, NOISE)
    chosen, rejected = (0, 1) if difference >= 0 else (1, 0)
    safety = None
    if kind == "safety":
        if verdicts[chosen].unsafe and not verdicts[rejected].unsafe:
            return None
        safety = "chosen_safe" if verdicts[rejected].unsafe else "both_safe"
        if verdicts[chosen].unsafe:
            safety = "both_unsafe"
    responses = first, second
    return Comparison(
        prompt=messages,
        chosen=responses[chosen],
        rejected=responses[rejected],
        rating=_rating(abs(difference)),
        safety=safety,
        kind=kind,
        source="quickstart",
    )


def _worth(verdict: Verdict, kind: str) -> float:
    """What the guideline of a batch asks for; among equally safe answers, the better one."""
    if kind == "safety":
        return 0.5 * verdict.safety + 0.5 * verdict.helpfulness
    return verdict.helpfulness


def _rating(difference: float) -> str:
    return next(rating for rating, least in RATING_FROM.items() if difference >= least)
