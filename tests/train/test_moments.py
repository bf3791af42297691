"""AdamW's state in less memory: bf16 moments keep their averages, masters may be on the CPU."""

import pytest
import torch
from small_models import packed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama2rt.model import Llama, LlamaConfig
from llama2rt.train import Optimizer, TrainOptions, moments
from llama2rt.train.moments import round_stochastically
from llama2rt.train.precision import MasterWeights


def losses(steps: int = 40, **options) -> tuple[Llama, Optimizer, list[float]]:
    """A small model after `steps` on a cycle of tokens, with its optimizer and the losses."""
    model = Llama(LlamaConfig(32, 2, 2, 2, 64, vocab_size=40, context=64)).initialize(0)
    optimizer = Optimizer(model, TrainOptions(lr=3e-3, **options))
    return model, optimizer, take(model, optimizer, range(steps))


def take(model: Llama, optimizer: Optimizer, steps: range) -> list[float]:
    found = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        starts = torch.randint(40, (8,), generator=draw).tolist()
        batch = packed(*((torch.arange(24) * 7 + start) % 40 for start in starts))
        loss = -model(*batch, batch[0].roll(-1)).mean()
        loss.backward()
        optimizer.step(3e-3)
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_with_bf16_moments_is_that_with_fp32_ones(precision):
    _, full, expected = losses(precision=precision)
    _, half, found = losses(precision=precision, moments="bf16")
    assert expected[-1] < 0.5 * expected[0]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    sizes = [
        sum(t.nbytes for name, t in o.state_dict().items() if name.startswith("exp_avg"))
        for o in (full, half)
    ]
    assert sizes[1] * 2 == sizes[0]
    assert {master.dtype for master in half.master.values()} == {torch.float32}


def test_fp32_moments_are_never_rounded(monkeypatch):
    monkeypatch.setattr(moments, "round_stochastically", None)
    losses(steps=1)
    with pytest.raises(TypeError, match="not callable"):
        losses(steps=1, moments="bf16")


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted():
    whole, _, _ = losses(steps=6, moments="bf16")
    _, optimizer, _ = losses(steps=4, moments="bf16")
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    resumed, other, _ = losses(steps=0, moments="bf16")
    other.load_state_dict(state)
    take(resumed, other, range(4, 6))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def second_moment(beta2: float, steps: int) -> float:
    """Mean over 4096 weights of exp_avg_sq, in units of what it should be, `steps` after gradients
    have fallen from 1 to 0.1."""
    weight = nn.Linear(64, 64, bias=False)
    optimizer = Optimizer(weight, TrainOptions(beta2=beta2, moments="bf16", clip=1e9))
    gradients = [1.0] * 20 + [0.1] * steps
    exact = 0.0
    for gradient in gradients:
        weight.weight.grad = torch.full((64, 64), gradient)
        optimizer.step(1e-4)
        exact = beta2 * exact + (1 - beta2) * gradient**2
    return float(optimizer.state_dict()["exp_avg_sq.weight"].float().mean()) / exact


@pytest.mark.parametrize("beta2, steps, nearest", [(0.95, 200, 1.02), (0.999, 500, 1.2)])
def test_moments_follow_gradients_that_fall(monkeypatch, beta2, steps, nearest):
    """Rounded to the nearest they stop above: at beta2 0.999 where they were."""
    assert second_moment(beta2, steps) == pytest.approx(1.0, rel=0.005)
    monkeypatch.setattr(moments, "round_stochastically", lambda values, bits: values.bfloat16())
    assert second_moment(beta2, steps) > nearest


def test_rounding_is_to_a_neighbour_and_right_on_average():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=draw) * torch.logspace(-20, 20, 64)
    bits = torch.empty(20_000, 64, dtype=torch.int32).random_(-(2**31), 2**31, generator=draw)
    rounded = round_stochastically(values.expand(20_000, -1).contiguous(), bits)
    assert rounded.dtype == torch.bfloat16
    ulp = values.abs() * 2**-7
    assert bool(((rounded.float() - values).abs() <= ulp).all())
    assert float(((rounded.double().mean(0) - values) / ulp).abs().max()) < 0.02
    exact = values.bfloat16()
    assert torch.equal(round_stochastically(exact.float(), bits[0]), exact)


def test_on_the_cpu_the_cpu_for_the_optimizer_changes_no_bit():
    for precision in ("fp32", "bf16"):
        here, _, _ = losses(steps=3, precision=precision)
        there, optimizer, _ = losses(steps=3, precision=precision, optimizer_device="cpu")
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(a, b)
        if precision == "fp32":  # the same tensors
            master = optimizer.master["output.weight"]
            assert master.data_ptr() == there.output.weight.data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kept", ["fp32", "bf16"])
def test_a_gpu_keeps_its_weights_and_the_cpu_all_else(monkeypatch, precision, kept):
    """Shapes and devices alone, as torch's fake tensors carry them: no GPU is needed."""
    published = []

    def publish(weights: MasterWeights, i: int) -> None:
        # A copy into a fake tensor of a device that is not there is refused.
        published.append((weights.parameters[i].device.type, weights.tensors[i].device.type))

    monkeypatch.setattr(MasterWeights, "publish", publish)
    monkeypatch.setattr(Optimizer, "_norm", lambda self: 1.0)
    options = TrainOptions(precision=precision, moments=kept, optimizer_device="cpu")
    with FakeTensorMode():
        model = nn.Linear(8, 4, bias=False, device="meta")
        model.weight = nn.Parameter(torch.empty(4, 8, device="cuda"))
        optimizer = Optimizer(model, options)
        for _ in range(2):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.accumulate()
        assert [g.device.type for g in optimizer._gradients] == ["cpu"]
        monkeypatch.setattr(
            moments, "_noise", lambda like, seed: (torch.zeros_like(like).int(),) * 2
        )
        monkeypatch.setattr(moments, "int", lambda value: 0, raising=False)
        optimizer.step(1e-3)
        assert model.weight.device.type == "cuda" and model.weight.dtype == options.dtype
        assert published == [("cuda", "cpu")]
        assert {t.device.type for t in optimizer.state_dict().values()} == {"cpu"}
