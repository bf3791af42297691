"""A planted optimum is found at every N, with an interval that holds it; and diversity by hand."""

import math

import numpy as np
import pytest

from llama2rt.evaluate import best_of, diversity
from llama2rt.evaluate.temperature import choose

TEMPERATURES = (0.5, 0.8, 1.1, 1.4, 1.7)
# Expected maximum of n standard normals (Harter, 1961).
MAXIMUM = {1: 0.0, 10: 1.5388}


def planted(prompts=150, samples=20):
    """Rewards that fall with the square of the temperature and vary with it: the best of n is
    expected to earn t * maximum(n) - 0.7 t^2, the most at 1.1 for n = 10, at the lowest for 1."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=(prompts, 1))
    return {
        t: difficulty - 0.7 * t**2 + t * generator.normal(size=(prompts, samples))
        for t in TEMPERATURES
    }


def test_the_planted_optimum_is_found_and_moves_with_n():
    rewards = planted()
    found = choose(rewards, 10)
    assert (found["temperature"], found["n"]) == (1.1, 10)
    assert (found["prompts"], found["samples"]) == (150, 20)
    assert choose(rewards, 1)["temperature"] == 0.5
    for row in found["temperatures"]:
        t = row["temperature"]
        # Prompts differ by as much as their difficulty does, in every temperature alike.
        shared = np.mean([values.mean() + 0.7 * u**2 for u, values in rewards.items()])
        expected = t * MAXIMUM[10] - 0.7 * t**2 + shared
        assert row["best"]["mean"] == pytest.approx(expected, abs=0.15)
        curve = row["curve"]
        assert (np.diff(curve["max"]) > 0).all()
        assert (np.array(curve["low"]) <= curve["max"]).all()
        assert (np.array(curve["high"]) >= curve["max"]).all()
        # Of a symmetric reward the median does not move with N, but for the noise of the mean.
        flat = np.array(curve["median"]) - curve["median"][0]
        assert np.abs(flat).max() < 4 * t / math.sqrt(150 * 20)
        if t == 1.1:
            assert row["behind"] is None
        else:
            assert row["behind"]["mean"] > 0
    # What all prompts share cancels: two temperatures are told apart where their intervals overlap.
    far = found["temperatures"][-1]
    assert far["behind"]["low"] > 0
    assert far["best"]["high"] > found["temperatures"][2]["best"]["low"]


def test_of_equal_temperatures_the_lowest():
    same = np.random.default_rng(1).normal(size=(5, 4))
    assert choose({1.3: same, 0.7: same, 1.0: same}, 3)["temperature"] == 0.7


def test_largest_is_what_curves_average():
    rewards = np.random.default_rng(2).normal(size=(6, 9))
    by_prompt = best_of.largest(rewards)
    assert by_prompt.shape == (6, 9)
    np.testing.assert_allclose(by_prompt.mean(0), best_of.curves(rewards)["max"], rtol=1e-12)
    np.testing.assert_allclose(by_prompt[:, -1], rewards.max(1), rtol=1e-12)


@pytest.mark.parametrize(
    ("rewards", "n", "said"),
    [
        ({}, 1, "at least one temperature"),
        ({1.0: np.zeros((2, 3)), 0.7: np.zeros((2, 4))}, 2, "the same prompts and samples"),
        ({1.0: np.zeros((2, 3))}, 4, "expected 1 to 3"),
        ({1.0: np.array([[np.nan]])}, 1, "finite"),
    ],
)
def test_refusals(rewards, n, said):
    with pytest.raises(ValueError, match=said):
        choose(rewards, n)


def test_distinct():
    texts = ["a b a b", "a b c", ""]
    assert diversity.distinct(texts, 1) == 3 / 7
    assert diversity.distinct(texts, 2) == 3 / 5  # ab ba ab, ab bc
    assert diversity.distinct(texts, 5) is None


def by_definition(texts):
    """Each text against the list of the others, n-gram by n-gram."""
    words = [text.split() for text in texts if text.split()]

    def count(gram, text):
        n = len(gram)
        return sum(tuple(text[i : i + n]) == gram for i in range(len(text) - n + 1))

    scores = []
    for i, text in enumerate(words):
        others = words[:i] + words[i + 1 :]
        logs = []
        for n in range(1, 5):
            grams = [tuple(text[j : j + n]) for j in range(len(text) - n + 1)]
            if grams:
                clipped = sum(
                    min(count(gram, text), max(count(gram, other) for other in others))
                    for gram in set(grams)
                )
                logs.append(math.log(max(clipped, 0.1) / len(grams)))
        nearest = min((len(o) for o in others), key=lambda n: (abs(n - len(text)), n))
        scores.append(math.exp(min(0, 1 - nearest / len(text)) + sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def test_self_bleu_against_its_definition():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcd"), size=n)) for n in (1, 2, 3, 5, 5, 8, 13)]
    assert diversity.self_bleu([*texts, " "]) == pytest.approx(by_definition(texts), rel=1e-12)
    assert diversity.self_bleu(["so it is"] * 3) == pytest.approx(1)
    assert diversity.self_bleu(["a b c d e", "f g h i j"]) < 0.05
    assert diversity.self_bleu(["alone", ""]) is None
