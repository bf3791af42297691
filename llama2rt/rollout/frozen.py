"""Frozen models that leave a GPU's memory to others between the phases that use them.

A phase is one call of a function under `phase`. The weights wait in pinned CPU memory; since nobody
changes them, they are copied to the GPU when a phase begins and simply dropped there when it ends.
Or they lie in shards over all ranks, which then read together (`share`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from llama2rt.parallel import Mesh

Arguments = ParamSpec("Arguments")
Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")


def offload(model: Model) -> Model:
    """Let `model`, which is frozen, wait in CPU memory between phases. Where its device has no
    memory of its own there is nothing to leave, and it stays as it is."""
    device = next(model.parameters()).device
    if has_own_memory(device):
        resting = {parameter: _resting(parameter.data) for parameter in model.parameters()}
        for parameter, weight in resting.items():
            parameter.data = weight
        model.offloaded = _Offloaded(device, resting)  # type: ignore[assignment]
    return model


def share(model: Model, mesh: Mesh) -> Model:
    """Let `model`, which lies in shards over `mesh`, be read by all ranks of it together."""
    model.shared_over = mesh  # type: ignore[assignment]
    return model


def shared_over(model: nn.Module) -> Mesh | None:
    """The processes that have to read `model` together, each some of the micro-batches and all the
    same number of them; None where whoever has it reads it alone."""
    found: Any = getattr(model, "shared_over", None)
    return found


class _Offloaded:
    """Where a model works, and what of it waits."""

    def __init__(self, device: torch.device, resting: dict[nn.Parameter, Tensor]) -> None:
        self.device, self._resting = device, resting

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        for parameter, weight in self._resting.items():
            parameter.data = move(weight, self.device)
        try:
            yield
        finally:
            for parameter, weight in self._resting.items():
                parameter.data = weight


def phase(
    function: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """A function of a model, which need not be on its device before and after a call."""

    @functools.wraps(function)
    def call(model: Any, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        offloaded = getattr(model, "offloaded", None)
        with offloaded.working() if offloaded is not None else contextlib.nullcontext():
            return function(model, *arguments, **options)

    return call


def device_of(model: nn.Module) -> torch.device:
    """Where `model` works."""
    offloaded: Any = getattr(model, "offloaded", None)
    return next(model.parameters()).device if offloaded is None else offloaded.device


def has_own_memory(device: torch.device) -> bool:
    """Whether what lies on `device` takes no memory of the CPU's."""
    return device.type != "cpu"


def move(weight: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, in order with what runs there next."""
    return weight.to(device, non_blocking=True)


def _resting(weight: Tensor) -> Tensor:
    weight = weight.cpu()
    return weight.pin_memory() if torch.cuda.is_available() else weight
