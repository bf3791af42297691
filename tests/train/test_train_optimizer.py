"""AdamW with fp32 masters: equal to PyTorch's in fp32, and able to move weights in bf16."""

import math

import pytest
import torch
from torch import nn

from llama2rt.train import Optimizer, TrainOptions
from llama2rt.train import optimizer as module


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 12, generator=generator).to(model[0].weight.dtype)
    model(x).square().sum().backward()


@pytest.mark.parametrize("chunk", [1, 100, 1 << 30])
def test_fp32_equals_torch_adamw_with_clipping_and_decay_on_matrices(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    options = TrainOptions(lr=1e-2, clip=0.5, weight_decay=0.3)
    ours, theirs = network(), network()
    optimizer = Optimizer(ours, options)
    peer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.3},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        norm = optimizer.step(1e-2)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert norm == pytest.approx(float(expected), rel=1e-6)
        peer.step()
        peer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_updates_too_small_for_bf16_accumulate_in_the_masters():
    model = network()
    optimizer = Optimizer(model, TrainOptions(lr=1e-6, precision="bf16", weight_decay=0.0))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    before = optimizer.master["0.weight"].clone()
    for _ in range(50):
        backward(model, 0)
        optimizer.step(1e-6)
    moved = (optimizer.master["0.weight"] - before).abs()
    assert float(moved.min()) > 2e-5  # 50 steps of about 1e-6, each far below a bf16 ulp
    assert torch.equal(model[0].weight, optimizer.master["0.weight"].bfloat16())


def test_masters_keep_the_fp32_values_a_model_comes_with():
    model = network()
    weight = model[0].weight.detach().clone()
    optimizer = Optimizer(model, TrainOptions(precision="bf16"))
    assert torch.equal(optimizer.master["0.weight"], weight)


def test_gradients_accumulate_in_fp32():
    model = network(torch.bfloat16)
    optimizer = Optimizer(model, TrainOptions(precision="bf16", clip=math.inf))
    # In bf16 1 + 0.001 is 1, and 256 + 1 is 256: such gradients would be lost.
    for value in [1.0] + [0.001] * 64 + [1.0] * 600:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.accumulate()
    total = 601 + 64 * float(torch.tensor(0.001).bfloat16())
    count = sum(p.numel() for p in model.parameters())
    assert optimizer.step(0.0) == pytest.approx(total * math.sqrt(count), rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = network()
    optimizer = Optimizer(model, TrainOptions(lr=1e-2))
    backward(model, 0)
    optimizer.step(1e-2)
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    backward(model, 1)
    model[0].bias.grad[3] = math.inf
    with pytest.raises(FloatingPointError, match="gradient norm is inf"):
        optimizer.step(1e-2)
    assert all(torch.equal(before[name], t) for name, t in optimizer.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_restores_bit_for_bit(precision):
    options = TrainOptions(lr=1e-2, precision=precision)
    model = network()
    optimizer = Optimizer(model, options)
    backward(model, 0)
    optimizer.step(1e-2)
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    backward(model, 1)
    optimizer.step(1e-2)

    other = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    resumed = Optimizer(other, options)
    resumed.load_state_dict(state)
    backward(other, 1)
    resumed.step(1e-2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused():
    state = Optimizer(network(), TrainOptions()).state_dict()
    optimizer = Optimizer(nn.Sequential(nn.Linear(12, 16)), TrainOptions())
    with pytest.raises(ValueError, match="unexpected"):
        optimizer.load_state_dict(state)


def test_norm_of_a_large_tensor_is_exact():
    # PyTorch's own fp32 norm on a CPU is 3 % low at 2e8 elements and 0.05 % low already at 1e6.
    model = nn.Linear(2000, 5000, bias=False)
    optimizer = Optimizer(model, TrainOptions(clip=math.inf))
    model.weight.grad = torch.full_like(model.weight, 0.37)
    assert optimizer.step(0.0) == pytest.approx(0.37 * math.sqrt(1e7), rel=1e-5)
