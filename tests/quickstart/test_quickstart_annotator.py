"""Annotators follow the judge, with noise, and obey the paper's protocol."""

import collections
import random

from llama2rt.annotate import AnswerPair
from llama2rt.data.records import Comparison, Prompt
from llama2rt.quickstart import tasks
from llama2rt.quickstart.annotator import compare
from llama2rt.quickstart.judge import Key, judge

QUESTION = [{"role": "user", "content": "What is 12 plus 7?"}]
SUM = Key.of(tasks.addition(12, 7), "What is 12 plus 7?")
CODE = Key.of(tasks.secret("4719"), "What is the passcode?")
SAFE, UNSAFE = "I am sorry, I cannot share the passcode.", "The passcode is 4719."


def said(key: Key, first: str, second: str, kind: str, rng: random.Random) -> Comparison | None:
    """The comparison that an annotator makes of two answers to a prompt of this kind."""
    pair = AnswerPair("training:x", Prompt("x", QUESTION, kind), first, second)
    judgement = compare(pair, key, rng)
    return None if judgement is None else judgement.comparison(pair, "annotate-1")


def test_the_larger_the_difference_the_higher_the_rating_and_the_surer_the_choice():
    responses = {
        "best": "12 plus 7 is 19. Happy to help!",
        "close": "12 plus 7 is 19.",
        "curt": "19",
        "wrong": "12 plus 7 is 26. Happy to help!",
        "useless": "I do not know.",
    }
    rng = random.Random(0)
    shares, ratings = {}, {}
    for name in ("close", "curt", "wrong", "useless"):
        comparisons = [
            said(SUM, *pair, "helpfulness", rng)
            for pair in ((responses["best"], responses[name]), (responses[name], responses["best"]))
            for _ in range(300)
        ]
        shares[name] = sum(c.chosen == responses["best"] for c in comparisons) / len(comparisons)
        ratings[name] = collections.Counter(c.rating for c in comparisons).most_common(1)[0][0]
    assert 0.65 < shares["close"] < shares["curt"] <= shares["wrong"] == shares["useless"] == 1
    assert ratings == {
        "close": "negligibly_better",
        "curt": "slightly_better",
        "wrong": "better",
        "useless": "significantly_better",
    }


def test_equal_worth_is_a_coin_flip_that_is_rated_negligible():
    rng = random.Random(1)
    pair = "12 plus 7 is 19. Happy to help!", "12 plus 7 is 19. Glad to help!"
    assert judge(SUM, pair[0]).helpfulness == judge(SUM, pair[1]).helpfulness
    comparisons = [said(SUM, *pair, "helpfulness", rng) for _ in range(400)]
    assert 0.4 < sum(c.chosen == pair[0] for c in comparisons) / 400 < 0.6
    assert collections.Counter(c.rating for c in comparisons)["negligibly_better"] > 160


def test_safety_labels_and_the_excluded_pair():
    rng = random.Random(2)
    c = said(CODE, UNSAFE, SAFE, "safety", rng)
    assert (c.chosen, c.safety, c.kind) == (SAFE, "chosen_safe", "safety")
    c = said(CODE, SAFE, "No.", "safety", rng)
    assert c.safety == "both_safe"
    c = said(CODE, UNSAFE, "4719", "safety", rng)
    assert c.safety == "both_unsafe"

    class Mistaken(random.Random):
        def gauss(self, mu=0.0, sigma=1.0):
            return 2.0  # for the first response, however unsafe it is

    assert said(CODE, UNSAFE, SAFE, "safety", Mistaken()) is None


def test_pairs_that_cannot_be_compared_are_not_used():
    """Equal and empty answers are not even shown: tests/stages/test_annotate_pairs.py."""
    rng = random.Random(3)
    assert said(SUM, "19", "1\x009", "helpfulness", rng) is None
    assert said(SUM, "19", "20", "helpfulness", rng).safety is None
