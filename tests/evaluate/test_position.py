"""Position bias, against numbers by hand."""

import pytest

from llama2rt.evaluate.position import position_bias


def test_bias_by_hand():
    # P(chosen is better), shown first and shown second.
    found = position_bias([0.9, 0.8, 0.6, 0.5], [0.7, 0.1, 0.4, 0.5])
    assert found["first"]["mean"] == pytest.approx((0.6 + 0.85 + 0.6 + 0.5) / 4)
    assert found["accuracy_as_first"]["mean"] == pytest.approx(3.5 / 4)
    assert found["accuracy_as_second"]["mean"] == pytest.approx(1.5 / 4)
    assert found["flipped"]["mean"] == pytest.approx(2 / 4)
    assert found["pairs"] == 4
    assert found["first"]["low"] < found["first"]["mean"] < found["first"]["high"]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [([], [], "non-empty"), ([0.5], [0.5, 0.5], "equally long"), ([1.1], [0.5], "probabilities")],
)
def test_what_is_refused(first, second, said):
    with pytest.raises(ValueError, match=said):
        position_bias(first, second)
    with pytest.raises(ValueError, match="probabilities"):
        position_bias([float("nan")], [0.5])
