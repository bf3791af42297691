"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a model's linear layers.

The layers are peft's, put around ours in place: a module keeps its name, its `weight` and its
product (`ops.linear`), and everything that runs a model, the sampling engine too, runs it with its
adapter. The weights below are frozen. With the adapter off the model is the one it was made of.

Left out: adapters on the embedding and the output, which `ops.token_logprob` reads as a weight.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama2rt.errors import InputError
from llama2rt.model.heads import ScalarModel

TARGETS = ("query", "key", "value", "attention_output", "gate", "up", "down")
"""the linear layers of a block"""
NAME = "default"
"""what peft calls the one adapter of a model"""


def require_peft() -> Any:
    """The module peft; InputError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"lora: needs peft, which cannot be imported ({error}); "
            "install it with pip install 'llama2rt[lora]'"
        ) from None
    return peft


def adapt(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
) -> None:
    """Freeze `model` (a Llama or a ScalarModel) and put an adapter beside each of `targets` in each
    block: W x + alpha / rank * B A x.

    A [rank, in] is drawn from `seed` as peft draws it, B [out, rank] is 0, so that nothing changes
    yet; both are fp32 whatever the model's dtype, and trainable. So is a ScalarModel's head, whole.
    Beside weights on the meta device an adapter has values, on the CPU.
    InputError where peft is missing.
    """
    peft = require_peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    state = torch.random.get_rng_state()
    try:
        # peft draws on the CPU, wherever the model is.
        torch.random.default_generator.manual_seed(seed)
        with _seemingly_on_cpu(model):
            peft.inject_adapter_in_model(config, model, NAME)
    finally:
        torch.random.set_rng_state(state)
    for layer in layers(model).values():
        layer.lora_A.to(torch.float32)
        layer.lora_B.to(torch.float32)
    if isinstance(model, ScalarModel):
        model.head.to(torch.float32).requires_grad_(True)


@contextlib.contextmanager
def _seemingly_on_cpu(model: nn.Module) -> Iterator[None]:
    """Inside, matrices on the meta device are on the CPU, as one number seen many times. peft moves
    an adapter to where the matrix beside it is: on the meta device its values would be lost."""
    found = {
        module: module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.is_meta
    }
    for module, weight in found.items():
        seen = torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape)
        module.weight = nn.Parameter(seen, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        for module, weight in found.items():
            weight.requires_grad_(module.weight.requires_grad)
            module.weight = weight


def layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the linear layer that each is around; empty without an
    adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def adapt_like(model: nn.Module, adapted: nn.Module) -> None:
    """Put the adapter that `adapted` has, if it has one, around the layers of a model of the same
    shape, with fresh weights."""
    found = layers(adapted)
    if not found:
        return
    layer = next(iter(found.values()))
    targets = sorted({name.rpartition(".")[2] for name in found})
    adapt(model, rank=layer.r[NAME], alpha=layer.lora_alpha[NAME], targets=targets)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what it did before `adapt`."""
    adapted = layers(model).values()
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


class WithoutAdapter(nn.Module):
    """A model under an adapter as it is without it, on the same weights: of a policy, the one that
    it began as. Not to be trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What `model` returns with its adapter off."""
        with adapter_off(self.model):
            return self.model(*inputs, **options)

    def hidden(self, *inputs: Any) -> Tensor:
        """`hidden` of `model` with its adapter off."""
        model: Any = self.model
        with adapter_off(model):
            found: Tensor = model.hidden(*inputs)
            return found

    @property
    def output(self) -> nn.Module:
        """The output layer, which no adapter changes."""
        model: Any = self.model
        layer: nn.Module = model.output
        return layer
