"""The learning rate's course and the checks on train options."""

import itertools
import math

import pytest
from pydantic import ValidationError

from llama2rt.run import Recipe
from llama2rt.train import TrainOptions, learning_rate
from llama2rt.train.schedule import warn_of_warmup


def test_cosine_with_warmup_hits_its_landmarks():
    options = TrainOptions(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, 111, options) for step in range(111)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_constant_stays_at_the_peak():
    options = TrainOptions(lr=2.0, schedule="constant", warmup_steps=2)
    assert [learning_rate(step, 5, options) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_reward_model_warmup_is_three_percent_but_at_least_five_steps():
    options = TrainOptions(lr=1.0, warmup_ratio=0.03, warmup_minimum=5)
    assert learning_rate(0, 20, options) == pytest.approx(1 / 5)
    assert learning_rate(0, 1000, options) == pytest.approx(1 / 30)


def test_a_warmup_longer_than_the_run_is_named(caplog):
    warn_of_warmup(2000, TrainOptions(lr=3e-4, warmup_steps=2000))
    warn_of_warmup(2, TrainOptions(lr=3e-4, warmup_ratio=0.9))
    assert not caplog.text
    warn_of_warmup(500, TrainOptions(lr=3e-4, warmup_steps=2000))
    assert (
        "train.warmup_steps: the warm-up of 2000 steps is longer than the run of 500" in caplog.text
    )
    assert "ends at 7.5e-05 and never reaches lr 0.0003" in caplog.text
    caplog.clear()
    warn_of_warmup(3, TrainOptions(warmup_ratio=0.03, warmup_minimum=5))
    assert "train.warmup_minimum: the warm-up of 5 steps is longer than the run of 3" in caplog.text


def test_options_refuse_nonsense():
    for bad in ({"lr": 0}, {"lr": math.nan}, {"precision": "fp8"}, {"lrr": 1}):
        with pytest.raises(ValidationError, match=rf"\n{next(iter(bad))}\n"):
            TrainOptions(**bad)
    with pytest.raises(ValidationError, match="excludes"):
        TrainOptions(warmup_steps=3, warmup_ratio=0.1)


class Stage(Recipe):
    train: TrainOptions = TrainOptions(lr=2e-5, warmup_steps=3)


def test_a_partial_table_keeps_the_stages_own_defaults():
    recipe = Stage.model_validate({"train": {"clip": 0.5}})
    assert (recipe.train.lr, recipe.train.warmup_steps, recipe.train.clip) == (2e-5, 3, 0.5)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "warmup_ratio"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_are_finite(name, value):
    with pytest.raises(ValidationError, match=name):
        TrainOptions(**{name: value})
    assert TrainOptions(clip=float("inf")).clip == float("inf")
