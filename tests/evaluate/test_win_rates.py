"""Win rates: ties half, prompts the unit, a judge's position bias cancelled and shown."""

import numpy as np
import pytest

from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.win_rates import judged, matrix, win_rate


def test_wins_ties_losses():
    got = win_rate([3.0, 1.0, 1.0, 0.0], [1.0, 1.0, 2.0, -1.0])
    assert (got.wins, got.ties, got.losses) == (2, 1, 1)
    assert got.rate == wilson(2.5, 4)


def test_every_sample_meets_every_other_and_a_prompt_counts_once():
    got = win_rate([[1.0, 3.0], [0.0]], [[2.0], [1.0, -1.0, 0.0]])
    assert got.rate.mean == pytest.approx((0.5 + 0.5) / 2)
    assert (got.wins, got.ties, got.losses) == (0, 2, 0)
    assert got.rate == wilson(1.0, 2)  # two prompts, not five pairings


def test_equals_brute_force_and_swaps():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 60, 4)).astype(float)
    expected = np.mean(
        [np.mean([(x > y) + 0.5 * (x == y) for x in a[i] for y in b[i]]) for i in range(60)]
    )
    assert win_rate(a, b).rate.mean == pytest.approx(expected)
    assert win_rate(b, a).rate.mean == pytest.approx(1 - expected)


def test_matrix_has_all_pairs_and_no_diagonal():
    scores = {"SFT": [1.0, 1.0], "V1": [2.0, 0.0], "V2": [3.0, 3.0]}
    names, rates = matrix(scores)
    assert names == ["SFT", "V1", "V2"]
    assert np.isnan(np.diag(rates)).all()
    assert rates[2, 0] == 1.0 and rates[0, 2] == 0.0 and rates[0, 1] == 0.5
    assert matrix({})[1].shape == (0, 0)


MESSAGES = [{"role": "user", "content": "q"}]


def test_a_judge_that_likes_the_first_place_gives_a_tie_and_is_found_out():
    got = judged(lambda messages, first, second: 1.0, [MESSAGES] * 8, ["a"] * 8, ["b"] * 8)
    assert (got.wins, got.ties, got.losses) == (0, 8, 0)
    assert got.rate.mean == 0.5
    assert (got.a_first.mean, got.b_first.mean, got.consistent) == (1.0, 0.0, 0.0)


def test_a_fair_judge_is_consistent():
    def longer(messages, first, second):
        return 0.5 + 0.5 * np.sign(len(first) - len(second))

    got = judged(longer, [MESSAGES] * 3, ["aaa", "a", "aa"], ["b", "bb", "bb"])
    assert (got.wins, got.ties, got.losses, got.consistent) == (1, 1, 1, 1.0)
    assert got.rate == got.a_first == got.b_first


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="same prompts, got 1 and 2"):
        win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="prompt 1 needs finite"):
        win_rate([[1.0], []], [[1.0], [1.0]])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        judged(lambda *_: 2.0, [MESSAGES], ["a"], ["b"])
    with pytest.raises(ValueError, match="one answer a prompt"):
        judged(lambda *_: 1.0, [MESSAGES], ["a"], [])
