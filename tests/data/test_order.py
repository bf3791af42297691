"""Orders that are computed: each is a permutation, keys give different ones, none is favoured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data.order import Permutation


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**62), min_size=1, max_size=4))
def test_every_place_holds_another_item(size, key):
    order = Permutation(size, key)
    whole = order(np.arange(size))
    assert sorted(whole.tolist()) == list(range(size))
    # A part is what the whole has there, whatever else is asked for.
    assert order(np.arange(size // 3, size // 2)).tolist() == whole[size // 3 : size // 2].tolist()


def test_all_orders_of_few_items_come_about_as_often():
    """The 24 orders of four items over 4,800 keys: chi-square with 23 degrees of freedom, of which
    49.7 is exceeded once in a thousand."""
    orders = [tuple(Permutation(4, (1, key))(np.arange(4)).tolist()) for key in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def test_neighbours_are_torn_apart():
    """Of a long order neither the values nor the steps between them depend on the place."""
    size = 100_003
    order = Permutation(size, (7, 7))(np.arange(size)).astype(float)
    for lag in (1, 2, 16, 256):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 4 / size**0.5
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / size**0.5
    other = Permutation(size, (7, 8))(np.arange(size)).astype(float)
    assert abs(np.corrcoef(order, other)[0, 1]) < 4 / size**0.5


def test_a_trillion_items_cost_what_ten_do():
    places = np.arange(10**12 - 5, 10**12)
    found = Permutation(10**12, (3,))(places)
    assert len(set(found.tolist())) == 5 and (found < 10**12).all() and (found >= 0).all()


def test_nothing_has_no_order():
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        Permutation(0, (1,))
