"""fp32 masters survive the border between stages: what trains on starts from what was held."""

import pytest
import torch
from model_folders import make

import llama2rt
from llama2rt.checkpoint import native
from llama2rt.checkpoint.convert import convert
from llama2rt.model import ScalarModel
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions

LR = 5e-7  # DPO's (RLHF Workflow)
BF16 = TrainOptions(lr=LR, precision="bf16", weight_decay=0.0, eps=1e-8)


def around(size: float, model):
    """`model` with all weights of this size, of either sign."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
            parameter.copy_(size * signs * (1 + 0.1 * torch.rand(parameter.shape)))
    return model


def steps(model, count: int) -> None:
    """Steps of LR that raise every weight."""
    optimizer = Optimizer(model, BF16)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step(LR)


@pytest.mark.parametrize("kind", ["llama", "scalar"])
def test_two_stages_of_tiny_steps_add_up(tmp_path, kind):
    """Each stage's 20 steps of 5e-7 are a twelfth of half a bf16 ulp (1.2e-4) of a weight of 0.05:
    saved rounded, every one of them is lost."""
    model = make() if kind == "llama" else ScalarModel.from_llama(make())
    around(0.05, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for stage in ("one", "two"):
        steps(model, 20)
        native.save(model, None, tmp_path / stage)
        model, _ = llama2rt.load(tmp_path / stage, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - before[name]
        torch.testing.assert_close(moved, torch.full_like(moved, 40 * LR), rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("then", ["bf16", "fp32"])
def test_an_optimizer_goes_on_from_what_the_one_before_it_held(then):
    """Of one model, in one process: no file between the two."""
    model = around(0.05, make())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, 20)
    steps(model, 20)
    held = Optimizer(model, TrainOptions(precision=then)).master
    for name, master in held.items():
        moved = master - before[name]
        torch.testing.assert_close(moved, torch.full_like(moved, 40 * LR), rtol=0.02, atol=1e-8)
    if then == "fp32":
        assert all(torch.equal(held[name], p)
                   for name, p in model.named_parameters())  # fmt: skip


def test_frozen_uses_read_the_rounded_weights_and_exports_may_be_rounded(tmp_path):
    model = around(0.05, make())
    steps(model, 3)
    native.save(model, None, tmp_path / "m")
    frozen, _ = llama2rt.load(tmp_path / "m", dtype=torch.bfloat16)
    for a, b in zip(frozen.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)
    convert(tmp_path / "m", tmp_path / "hf", "hf", dtype="bf16")
    exported, _ = llama2rt.load(tmp_path / "hf")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}


def test_a_weight_changed_by_other_hands_is_saved_as_it_is(tmp_path):
    """A master that the parameter no longer rounds is stale."""
    model = around(0.05, make())
    steps(model, 3)
    with torch.no_grad():
        model.transformer.norm.weight.fill_(0.25)
    native.save(model, None, tmp_path / "m")
    loaded, _ = llama2rt.load(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(
        loaded.transformer.norm.weight, torch.full_like(loaded.transformer.norm.weight, 0.25)
    )
    masters = model.transformer.embedding.weight.master
    assert torch.equal(loaded.transformer.embedding.weight, masters)
    assert not torch.equal(masters, model.transformer.embedding.weight.float())


def test_a_tied_model_keeps_its_one_master(tmp_path):
    model = around(0.05, make(tied=True))
    steps(model, 3)
    native.save(model, None, tmp_path / "m")
    loaded, _ = llama2rt.load(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(loaded.output.weight, model.transformer.embedding.weight.master)
