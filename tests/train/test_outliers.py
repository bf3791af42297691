"""Outliers are not taken: which steps they are, that nothing but the count changes, and resume."""

from pathlib import Path

import json_lines
import numpy as np
import pytest
import torch

from llama2rt.data.loader import ExampleLoader
from llama2rt.data.packing import Batch, Example
from llama2rt.model import Llama, LlamaConfig
from llama2rt.run import Recipe, Run
from llama2rt.train import Optimizer, TrainOptions, fit
from llama2rt.train.outliers import Outliers

CONFIG = LlamaConfig(16, 1, 2, 2, 32, vocab_size=31, context=32)
OPTIONS = TrainOptions(
    lr=1e-3, schedule="constant", outlier_sigmas=6, outlier_window=4, checkpoint_every=3
)


def test_far_above_the_window_by_hand():
    """Losses 1, 2, 3, 4: mean 2.5, deviation 1.291, six of them 10.246."""
    outliers = Outliers(OPTIONS)
    assert all(outliers.accept(loss, 1.0 + loss / 100) for loss in (1.0, 2.0, 3.0, 4.0))
    assert not outliers.accept(10.25, 1.0)
    assert outliers.metrics() == {"skipped": 1.0}
    assert outliers.accept(10.24, 1.0)
    # Now 10.24, 2, 3, 4 are the window, whose deviation is 3.69; far below is no outlier.
    assert outliers.accept(-50.0, 1.0)
    assert outliers.metrics() == {"skipped": 1.0} and outliers.too_many is None


def test_the_norm_counts_alone_where_a_loss_says_nothing():
    outliers = Outliers(OPTIONS)
    assert all(outliers.accept(None, norm) for norm in (1.0, 1.1, 0.9, 1.0))
    assert not outliers.accept(None, 2.0) and outliers.accept(None, 1.2)


def test_nothing_is_judged_before_the_window_is_full_or_unless_asked():
    outliers = Outliers(OPTIONS)
    assert all(outliers.accept(value, value) for value in (1.0, 1.0, 1.0, 1e6))
    off = Outliers(TrainOptions())
    assert all(off.accept(value, value) for value in (*[1.0] * 200, 1e9))
    assert off.metrics() == {} and off.state_dict() == {}


def test_too_many_in_a_row():
    outliers = Outliers(OPTIONS.model_copy(update={"outlier_limit": 2}))
    for norm in (1.0, 1.1, 0.9, 1.0):
        outliers.accept(None, norm)
    outliers.accept(None, 9.0)
    outliers.accept(None, 1.0)  # one taken between them: no row
    outliers.accept(None, 9.0)
    assert outliers.too_many is None
    outliers.accept(None, 9.0)
    assert outliers.too_many == "2 steps in a row were outliers by train.outlier_sigmas"


def test_a_skipped_step_leaves_weights_and_moments_alone():
    model = Llama(CONFIG).initialize(0)
    optimizer = Optimizer(model, OPTIONS)
    tokens = torch.arange(8)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)

    def step(scale: float) -> None:
        logprob = model(tokens, tokens, cu_seqlens, tokens.roll(-1))
        (-scale * logprob.mean()).backward()
        optimizer.step(1e-3, 1.0)

    for _ in range(4):
        step(1.0)
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    step(1e4)
    after = optimizer.state_dict()
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert changed == ["outliers.counts"]
    step(1.0)  # with gradients of its own, not those of the step before
    assert optimizer.outliers.metrics() == {"skipped": 1.0}
    assert float(optimizer.state_dict()["step.embedding.weight"]) == 5.0


class Tiny(Recipe):
    train: TrainOptions = TrainOptions()


class Spike:
    """Cross-entropy, a thousandfold in some steps; every step is one call."""

    def __init__(self, done: int, steps: tuple[int, ...]) -> None:
        self.calls, self.steps = done, steps

    def __call__(self, model: Llama, batch: Batch):
        logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
        self.calls += 1
        return -logprob.sum() * (1000.0 if self.calls in self.steps else 1.0), {}


def trained(
    directory: Path, spikes: tuple[int, ...], *, until: int = 12, options: TrainOptions = OPTIONS
) -> Llama:
    run = Run.open(directory, Tiny(train=options), resume=True)
    rng = np.random.default_rng(0)
    examples = [Example.of(rng.integers(31, size=20)) for _ in range(16)]
    loader = ExampleLoader(examples, 4, 4096, seed=1)
    model = Llama(CONFIG).initialize(0)
    done = max(run.store.steps(), default=0)
    fit(run, model, loader, Spike(done, spikes), options, steps=until)
    return model


def test_a_resumed_run_skips_the_same_steps_to_the_bit(tmp_path):
    whole = trained(tmp_path / "whole", (7, 9))
    lines = json_lines.read(tmp_path / "whole" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0] * 6 + [1, 1, 2, 2, 2, 2]
    trained(tmp_path / "parts", (7, 9), until=8)  # its last checkpoint is of step 6
    parts = trained(tmp_path / "parts", (7, 9))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    again = json_lines.read(tmp_path / "parts" / "metrics.jsonl")
    assert [line["skipped"] for line in again] == [line["skipped"] for line in lines]


def test_a_run_that_only_skips_ends_and_says_so(tmp_path):
    options = OPTIONS.model_copy(update={"outlier_limit": 3})
    with pytest.raises(
        FloatingPointError, match=r"diverged, 3 steps in a row .* at step 9; step-6"
    ):
        trained(tmp_path / "run", tuple(range(7, 13)), options=options)
