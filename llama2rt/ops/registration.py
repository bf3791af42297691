"""How an op gets into torch: `torch.library.Library` (a fraction of `custom_op`'s cost per call).

Every schema takes the name of a backend as its last argument, and one implementation serves them
all: it looks up that backend's function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend

_LIB = torch.library.Library("llama2rt", "DEF")


def define(schema: str, fake: Callable) -> Callable:
    """Declare an op whose last argument names the backend that runs it; returns its entry point."""
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        *rest, choice = arguments
        return backend.implementation(name, choice, rest[0].dtype)(*rest)

    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llama2rt::{name}", fake, lib=_LIB)
    overload = getattr(torch.ops.llama2rt, name).default

    def call(*arguments: Any) -> Any:
        # Sampling a small model is bound by the cost of calls, most of it the dispatcher's two
        # detours through Python.
        if torch.is_grad_enabled() or backend.needs_dispatcher(*arguments):
            return overload(*arguments)
        return run(*arguments)

    return call


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give op `name` its gradient, once: a second derivative is refused."""

    def differentiate_once(ctx: Any, *upstream: Tensor | None) -> tuple:
        refuse_second_derivative(name)
        return backward(ctx, *upstream)

    torch.library.register_autograd(
        f"llama2rt::{name}", differentiate_once, setup_context=setup_context, lib=_LIB
    )


def refuse_second_derivative(name: str) -> None:
    """Called in the backward of op `name`: its own gradient would be missing from a second
    derivative, without an error."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"llama2rt::{name}: expected a backward without create_graph, got one with it;"
            " the ops have no second derivatives"
        )
