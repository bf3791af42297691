"""The piecewise reward, its logit, margins and the length penalty."""

import pytest
import torch

from llama2rt.algorithms import rewards


@pytest.mark.parametrize(
    "scheme, expected",
    [("small", [1, 2 / 3, 1 / 3, 0]), ("large", [3, 2, 1, 0]), ("none", [0, 0, 0, 0])],
)
def test_margins_are_table_27(scheme, expected):
    ratings = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    assert [rewards.margin(rating, scheme) for rating in ratings] == expected
    assert rewards.margin(None, scheme) == 0


def test_margin_refuses_unknown_names():
    with pytest.raises(ValueError, match="rating"):
        rewards.margin("much_better", "small")
    with pytest.raises(ValueError, match="scheme"):
        rewards.margin("better", "huge")


def test_piecewise_rule():
    helpful = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1])
    safe = torch.tensor([0.8, 0.14, 0.15, 0.14, 0.99])
    is_safety = torch.tensor([False, False, False, True, True])
    combined = rewards.combine(helpful, safe, is_safety)
    torch.testing.assert_close(combined, torch.tensor([0.9, 0.14, 0.9, 0.14, 0.99]))
    lenient = rewards.combine(helpful, safe, is_safety, threshold=0.0)
    torch.testing.assert_close(lenient[1], torch.tensor(0.9))


def test_raw_scores_are_refused():
    good, raw = torch.tensor([0.5]), torch.tensor([1.5])
    with pytest.raises(ValueError, match="safe"):
        rewards.combine(good, raw, torch.tensor([True]))
    with pytest.raises(ValueError, match="helpful"):
        rewards.combine(-raw, good, torch.tensor([True]))


def test_logit_gives_back_the_output_of_the_reward_model():
    raw = torch.tensor([-25.0, -3.0, 0.0, 17.5, 25.0])
    back = rewards.logit(torch.sigmoid(raw.double()))
    torch.testing.assert_close(back, raw.double(), rtol=1e-4, atol=0)
    assert torch.isfinite(rewards.logit(torch.tensor([0.0, 1.0]))).all()


def test_length_penalty():
    penalised = rewards.length_penalty(torch.tensor([1.0, 1.0]), torch.tensor([0, 100]), 0.01)
    torch.testing.assert_close(penalised, torch.tensor([1.0, 0.0]))
