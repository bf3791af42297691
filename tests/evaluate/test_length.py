"""Length correlation against SciPy, and prompts on which it does not exist."""

import numpy as np
import pytest
from scipy import stats

from llama2rt.evaluate.length import correlation


def test_equals_scipy_prompt_by_prompt():
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(20, 8)), rng.integers(1, 60, (20, 8))
    got = correlation(rewards, lengths)
    expected = [stats.pearsonr(x, y).statistic for x, y in zip(rewards, lengths, strict=True)]
    np.testing.assert_allclose(got.per_prompt, expected, rtol=1e-10)
    assert got.mean.mean == pytest.approx(np.mean(expected))
    assert got.mean.low < got.mean.mean < got.mean.high
    assert got.undefined == 0


def test_constant_prompts_are_reported_and_not_counted_as_zero():
    rewards = [[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]]
    lengths = [[10, 20, 30], [1, 2, 3], [7, 7, 7]]
    got = correlation(rewards, lengths)
    assert got.undefined == 2
    assert np.isnan(got.per_prompt[1:]).all()
    assert got.mean.mean == pytest.approx(1.0)
    nothing = correlation([[1.0, 1.0]], [[1, 2]])
    assert nothing.mean is None and nothing.undefined == 1


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="share a shape"):
        correlation([[1.0, 2.0]], [[1, 2, 3]])
    with pytest.raises(ValueError, match="finite"):
        correlation([[1.0, np.inf]], [[1, 2]])
