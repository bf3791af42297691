"""One AdamW step over fp32 parameters: ours, torch's, and NVIDIA apex's FusedAdam where installed.

Ours is train.Optimizer, whose update is torch's fused AdamW between a gradient norm and a loop
over chunks: the difference to `fused` is what these cost. Useful traffic is 28 bytes a parameter:
weight, gradient and both moments read, all but the gradient written. The ceiling is `clone`.
Gradients are small, so that none is clipped; the peers clip nothing.

    pytest -s benchmarks/training/test_optimizer.py
"""

from collections.abc import Callable

import peers
import pytest
import torch
from measure import DEVICES, SMOKE, Case, Contender, SetUp, compare
from torch import nn

from llama2rt.model import Llama, LlamaConfig

pytest.importorskip("pydantic", reason="train options are pydantic models")

from llama2rt.train import Optimizer, TrainOptions

LR = 1e-4
SHAPES = {
    "24M": LlamaConfig(dim=288, layers=6, heads=6, kv_heads=6, ffn_hidden=768),
    "134M": LlamaConfig(dim=768, layers=12, heads=12, kv_heads=12, ffn_hidden=2048),
}
if SMOKE:
    SHAPES = {
        "smoke": LlamaConfig(dim=64, layers=1, heads=2, kv_heads=2, ffn_hidden=96, vocab_size=64)
    }


def stepping(model: nn.Module, update: Callable[[], object]) -> Contender:
    """`update` with the same gradients each time: ours forgets them after a step."""
    parameters = list(model.parameters())
    gradients = [1e-5 * torch.randn_like(parameter) for parameter in parameters]

    def step() -> tuple:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        update()
        return ()

    return Contender(step, ())


def set_up(config: LlamaConfig, device: str) -> SetUp:
    def model() -> nn.Module:
        return Llama(config).initialize(0).to(device)

    ours = model()
    optimizer = Optimizer(ours, TrainOptions(lr=LR))
    contenders = {"ours": stepping(ours, lambda: optimizer.step(LR))}
    settings = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    makers: dict[str, Callable] = {
        "fused": lambda p: torch.optim.AdamW(p, fused=True, **settings),
        "foreach": lambda p: torch.optim.AdamW(p, foreach=True, **settings),
    }
    if device == "cuda":
        makers |= peers.adamw(settings)
    for name, make in makers.items():
        other = model()
        contenders[name] = stepping(other, make(other.parameters()).step)
    buffer = torch.randn(config.parameters, device=device)
    return SetUp(buffer.clone, contenders)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_adamw(benchmark, capsys, device, shape):
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip("no usable NVIDIA GPU" if device == "cuda" else "the GPU is measured")
    config = SHAPES[shape]
    case = Case(
        op="adamw",
        direction="step",
        device=device,
        size=f"{shape} parameters, fp32",
        x=config.parameters,
        axis="parameters",
        work=28 * config.parameters,
        unit="bytes",
        ceiling="clone",
        ceiling_work=8 * config.parameters,
        set_up=lambda: set_up(config, device),
        input_bytes=16 * config.parameters,
        judged=False,
    )
    compare(benchmark, capsys, case, ["ours"])
