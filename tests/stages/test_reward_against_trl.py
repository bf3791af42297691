"""A reward step beside TRL's: its loss and every gradient, with prompts shared or not."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import packed, transformers_twin
from trl_stand_in import trl_host

from llama2rt.checkpoint import hf
from llama2rt.checkpoint.hf import hf_name
from llama2rt.data.packing import Example, pack_pairs
from llama2rt.data.shared import packing
from llama2rt.model import LlamaConfig, ScalarModel
from llama2rt.rollout.scoring import score_tokens
from llama2rt.stages import reward
from llama2rt.train.recompute import recompute_blocks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "training"
PAD = 0
MARGINS = [1.0, 2 / 3, 0.0, 1 / 3]


def pairs() -> list[tuple[Example, Example]]:
    """Prompts of 5 to 40 tokens, each with two responses of 1 to 20; no id is padding's."""
    rng = np.random.default_rng(2)
    found = []
    for _ in MARGINS:
        prompt = rng.integers(1, 97, rng.integers(5, 41))
        sides = [np.concatenate([prompt, rng.integers(1, 97, rng.integers(1, 21))]) for _ in "ab"]
        found.append(tuple(Example.of(s, np.arange(len(s)) >= len(prompt)) for s in sides))
    return found


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    config = LlamaConfig(32, 2, 4, 2, 64, vocab_size=97, context=128)
    model = ScalarModel(config).initialize(1)
    with torch.no_grad():  # far from uniform attention, in which a wrong key would hide
        for block in model.transformer.blocks:
            block.query.weight.mul_(20)
            block.key.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def theirs(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """TRL's loss of the pairs and its gradients, by transformers' names."""
    trainer = pytest.importorskip("trl.trainer.reward_trainer")
    twin = transformers_twin(model)
    twin.config.pad_token_id = PAD
    rows = [
        {"chosen_ids": a.tokens.tolist(), "rejected_ids": b.tokens.tolist(), "margin": margin}
        for (a, b), margin in zip(pairs(), MARGINS, strict=True)
    ]
    inputs = trainer.DataCollatorForPreference(pad_token_id=PAD)(rows)
    host = trl_host(args=SimpleNamespace(center_rewards_coefficient=None))
    loss = trainer.RewardTrainer.compute_loss(host, twin, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_every_gradient_are_trls(model, theirs, share, recomputed):
    batch = pack_pairs(pairs(), {"margin": MARGINS}, packing(share))
    assert (batch.batch.keys is not None) == share
    recipe = reward.RewardRecipe(init="sft", data=["pairs.jsonl"])
    model.zero_grad()
    with recompute_blocks(model) if recomputed else contextlib.nullcontext():
        total, _ = reward.objective(recipe)(model, batch)
        (total / batch.weight).backward()
    loss, gradients = theirs
    torch.testing.assert_close(total.detach() / batch.weight, loss, rtol=1e-5, atol=1e-5)
    found = {hf_name(name): p.grad for name, p in model.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, float(error))


def test_steps_are_those_of_trls_trainer(model, theirs, tmp_path, monkeypatch):
    """As benchmarks/training/reward_step.py takes them: losses of five, each after the other's
    update, by the stage's loader, objective and optimizer and by TRL's trainer at work."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reward_sides as sides

    for name, value in {"PAIRS": 3, "PROMPT": 24, "RESPONSES": (2, 9), "VOCABULARY": 97}.items():
        monkeypatch.setattr(sides, name, value)
    monkeypatch.setattr(sides, "LR", 1e-3)
    monkeypatch.setitem(sides.TRL, "learning_rate", 1e-3)
    hf.save(model, None, tmp_path / "weights")
    found = {}
    for side, take in sides.SIDES.items():
        monkeypatch.setattr(sys, "stdin", io.StringIO("step\n" * 5))
        monkeypatch.setattr(sides, "ANSWERS", answers := io.StringIO())
        take(str(tmp_path / "weights"), "recomputed")
        found[side] = [json.loads(line)["loss"] for line in answers.getvalue().splitlines()]
    assert len(found["trl"]) == 5 and found["trl"][4] < found["trl"][0] - 0.01
    for side in ("ours", "whole"):
        np.testing.assert_allclose(found[side], found["trl"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_score_is_its_responses_alone(model):
    """Whatever shares the batch or the prompt, and whatever follows."""
    sides = [side.tokens for pair in pairs() for side in pair]
    alone = np.array([float(model(*packed(side.astype(np.int64)))[-1]) for side in sides])
    assert alone.std() > 0.1
    together = score_tokens(model, sides)
    shuffled = [3, 0, 6, 1, 5, 2, 7, 4]  # no side beside the one of its prompt
    apart = score_tokens(model, [sides[i] for i in shuffled])
    followed = [np.concatenate([side, side[::-1]]).astype(np.int64) for side in sides]
    values = model(*packed(*followed))
    ends = np.cumsum([0, *map(len, followed)])[:-1] + [len(side) - 1 for side in sides]
    for found in (together, apart[np.argsort(shuffled)], values[torch.from_numpy(ends)].numpy()):
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)
