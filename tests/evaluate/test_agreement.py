"""Gwet's AC1 and AC2 against published worked tables."""

import numpy as np
import pytest

from llama2rt.evaluate.agreement import gwet, weight_matrix

NO = np.nan
# Gwet, Handbook of Inter-Rater Reliability (4th ed.), page 120: 12 units, 4 raters, 5 categories.
FOUR_RATERS = (
    np.array(
        [
            [1, 1, NO, 1],
            [2, 2, 3, 2],
            [3, 3, 3, 3],
            [3, 3, 3, 3],
            [2, 2, 2, 2],
            [1, 2, 3, 4],
            [4, 4, 4, 4],
            [1, 1, 2, 1],
            [2, 2, 2, 2],
            [NO, 5, 5, 5],
            [NO, NO, 1, 1],
            [NO, NO, 3, NO],
        ]
    )
    - 1
)
# Two abstractors, 100 pregnancies (same book): ectopic, abnormal and normal intrauterine.
ABSTRACTORS = [[13, 0, 0], [0, 20, 7], [0, 4, 56]]


@pytest.mark.parametrize(
    "weights, observed, by_chance, coefficient, error",
    [
        ("nominal", 0.8182, 0.1903, 0.77544, 0.14295),
        ("ordinal", 0.968, 0.685, 0.899, 0.107),
        ("linear", 0.939, 0.571, 0.859, 0.117),
        ("quadratic", 0.975, 0.714, 0.914, 0.104),
    ],
)
def test_four_raters_with_missing_ratings(weights, observed, by_chance, coefficient, error):
    """Values printed by Gwet's irrCAC for this table, to the digits it prints."""
    got = gwet(FOUR_RATERS, weights=weights)
    assert got.observed == pytest.approx(observed, abs=6e-4)
    assert got.by_chance == pytest.approx(by_chance, abs=6e-4)
    assert got.coefficient == pytest.approx(coefficient, abs=6e-4)
    assert got.standard_error == pytest.approx(error, abs=6e-4)
    assert got.low <= got.coefficient <= got.high <= 1
    assert got.items == 12


@pytest.mark.parametrize(
    "weights, coefficient, low, high",
    [
        ("nominal", 0.8493305, 0.764, 0.935),
        ("ordinal", 0.925, 0.881, 0.969),
        ("linear", 0.900, 0.842, 0.958),
        ("quadratic", 0.940, 0.905, 0.976),
    ],
)
def test_two_abstractors(weights, coefficient, low, high):
    ratings = [
        [i, j]
        for i, row in enumerate(ABSTRACTORS)
        for j, count in enumerate(row)
        for _ in [0] * count
    ]
    got = gwet(ratings, weights=weights)
    assert got.coefficient == pytest.approx(coefficient, abs=6e-4)
    # irrCAC's interval uses Student's t with 99 degrees of freedom.
    assert (got.low, got.high) == pytest.approx((low, high), abs=2e-3)


def test_published_weights():
    np.testing.assert_allclose(
        weight_matrix(3, "ordinal"), [[1, 2 / 3, 0], [2 / 3, 1, 2 / 3], [0, 2 / 3, 1]]
    )
    np.testing.assert_allclose(
        weight_matrix(3, "quadratic"), [[1, 0.75, 0], [0.75, 1, 0.75], [0, 0.75, 1]]
    )
    with pytest.raises(ValueError, match="weights must be one of"):
        weight_matrix(3, "cubic")


def test_stays_high_where_kappa_breaks_down():
    """118 of 125 agree on the usual category (Feinstein and Cicchetti's paradox, 1990): kappa is
    below 0, AC1 near observed agreement. By hand after Gwet (2008, BJMSP 61, section 3): the usual
    category has 0.96 and 0.984 of the two raters' answers, on average 0.972."""
    ratings = [[0, 0]] * 118 + [[0, 1]] * 5 + [[1, 0]] * 2
    got = gwet(ratings)
    assert got.coefficient == pytest.approx((0.944 - 0.054432) / (1 - 0.054432))
    assert (got.observed, got.by_chance) == pytest.approx((0.944, 0.054432))


def test_full_agreement_chance_agreement_and_unused_categories():
    assert gwet([[0, 0], [1, 1], [2, 2]]).coefficient == 1.0
    coin = np.random.default_rng(0).integers(0, 2, (4000, 2))
    assert abs(gwet(coin).coefficient) < 0.05
    assert gwet([[0, 0], [1, 1]], categories=5).by_chance != gwet([[0, 0], [1, 1]]).by_chance


def test_items_without_ratings_do_not_count():
    padded = np.vstack([FOUR_RATERS, np.full((3, 4), NO)])
    assert gwet(padded) == gwet(FOUR_RATERS)
    assert gwet(np.nan_to_num(padded, nan=-1.0)) == gwet(FOUR_RATERS)


def test_bad_ratings_are_refused():
    with pytest.raises(ValueError, match="at least two ratings"):
        gwet([[0, NO], [NO, 1]])
    with pytest.raises(ValueError, match="outside 2 categories"):
        gwet([[0, 2]], categories=2)
    with pytest.raises(ValueError, match="items, raters"):
        gwet([0, 1])
