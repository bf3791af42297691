"""Ranking by comparisons: who is best and worst, how many comparisons it takes, and ties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.rollout.ranking import rank, tournament, win_rates


class Judge:
    """P(a is better than b) = sigmoid(worth of a - worth of b), counted."""

    def __init__(self, worth: list[list[float]]) -> None:
        self.worth, self.asked = worth, 0

    def __call__(self, matches) -> np.ndarray:
        self.asked += len(matches)
        gaps = [self.worth[g][a] - self.worth[g][b] for g, a, b in matches]
        assert all(a != b for _, a, b in matches)
        return 1 / (1 + np.exp(-np.array(gaps)))

    @property
    def sizes(self) -> list[int]:
        return [len(group) for group in self.worth]


def test_win_rates_are_means_over_the_other_answers():
    judge = Judge([[0.0, 2.0, -1.0], [3.0], []])
    found = win_rates(judge.sizes, judge)
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, -3.0])))  # 1 over 0, 2 over 0, 2 over 1
    expected = [(1 - p[0] + 1 - p[1]) / 2, (p[0] + 1 - p[2]) / 2, (p[1] + p[2]) / 2]
    assert found[0] == pytest.approx(expected)
    assert found[1].tolist() == [0.5] and found[2].tolist() == []
    assert judge.asked == 3


@given(st.lists(st.lists(st.integers(-50, 50), max_size=17, unique=True), max_size=4))
def test_a_tournaments_first_and_last_are_the_best_and_the_worst(worth):
    judge = Judge(worth)
    found = tournament(judge.sizes, judge)
    for group, standings in zip(worth, found, strict=True):
        n = len(group)
        assert len(standings) == n and all(0 < s < 1 for s in standings)
        if n < 2:
            continue
        assert np.argmax(standings) == np.argmax(group)
        assert np.argmin(standings) == np.argmin(group)
        assert (standings == standings.max()).sum() == (standings == standings.min()).sum() == 1
    # n - 1 to find the best; the worst is among those that never won, no more than half and one.
    assert judge.asked <= sum(n - 1 + n // 2 for n in judge.sizes if n > 1)


def test_both_ways_of_ranking_agree_on_the_ends_and_all_prompts_share_a_round():
    rounds = []
    judge = Judge([[1.0, 5.0, 3.0, -2.0, 0.0, 4.0, 2.0, -1.0], [0.0, 1.0]])

    def compare(matches):
        rounds.append(len(matches))
        return judge(matches)

    by_wins, by_rounds = (rank(judge.sizes, compare, how) for how in ("win_rate", "tournament"))
    assert rounds == [28 + 1, 4 + 1, 2, 1, 2, 1]
    for a, b in zip(by_wins, by_rounds, strict=True):
        assert (a.argmax(), a.argmin()) == (b.argmax(), b.argmin())


def test_equal_answers_keep_their_order():
    (standings,) = tournament([4], lambda matches: np.full(len(matches), 0.5))
    assert standings.argmax() == 0
    assert win_rates([3], lambda matches: np.full(len(matches), 0.5))[0].tolist() == [0.5] * 3
