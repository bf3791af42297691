"""token_logprob: the log-probability of each token's target, without logits in memory."""

import weakref
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend, logprob_tiles
from llama2rt.ops.checks import check_floating, check_index, check_like, mismatch
from llama2rt.ops.registration import autograd, define
from llama2rt.ops.tensors import empty_like, wide_dtype


def _token_logprob_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    logprob = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden))
    return (
        logprob,
        torch.empty_like(logprob) if entropy else logprob.new_empty(0),
        empty_like(logprob),
    )


_run_token_logprob = define(
    "token_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _token_logprob_fake,
)
# Here a target may be V or more: a token of which another rank has the weight's row
# (parallel.vocabulary), and of which lse and entropy know.
_run_token_logprob_backward = define(
    "token_logprob_backward(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor lse, Tensor? entropy, float temperature, str backend)"
    " -> (Tensor, Tensor)",
    lambda dlogprob, dentropy, hidden, weight, *_: (empty_like(hidden), empty_like(weight)),
)
# The same with memories for logits between the two, one of which becomes the gradient of weight:
# for backends that have it (logprob_tiles says what it saves).
_run_token_logprob_stashed = define(
    "token_logprob_stashed(Tensor hidden, Tensor weight, Tensor targets, float temperature,"
    " bool entropy, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, *rest: (
        *_token_logprob_fake(hidden, weight, *rest),
        *logprob_tiles.Stash.empty(hidden, weight, logprob_tiles.CPU),
    ),
)
_run_token_logprob_stashed_backward = define(
    "token_logprob_stashed_backward(Tensor(a!) dweight, Tensor(b!) tile, Tensor dlogprob,"
    " Tensor? dentropy, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, Tensor? entropy,"
    " float temperature, str backend) -> Tensor",
    lambda dweight, tile, dlogprob, dentropy, hidden, *_: empty_like(hidden),
)


class _Stashed:
    """Memories that hold logits, from a forward to its backward or its graph's end."""

    def __init__(self, dweight: Tensor, tile: Tensor) -> None:
        self.dweight, self.tile = dweight, tile


# id of a weight -> what is stashed for it. Once per weight: a graph of many calls would hold as
# many gradients of it at a time, where without a stash they are added up as they come.
_stashed: weakref.WeakValueDictionary[int, _Stashed] = weakref.WeakValueDictionary()


def _token_logprob_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    hidden, weight, targets, ctx.temperature, _, ctx.backend = inputs
    _, entropy, lse, *memory = output
    ctx.save_for_backward(hidden, weight, targets, lse, entropy)
    ctx.stashed = None
    if memory:
        ctx.stashed = _stashed[id(weight)] = _Stashed(*memory)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, *memory)


def _token_logprob_backward(
    ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None, *_: Tensor | None
) -> tuple:
    hidden, weight, targets, lse, entropy = ctx.saved_tensors
    # Used once: a second backward through a retained graph makes the logits anew.
    stashed, ctx.stashed = ctx.stashed, None
    if dlogprob is None and dentropy is None:
        return (None,) * 6
    if dlogprob is None:
        dlogprob = torch.zeros_like(lse)
    if dentropy is None:
        entropy = None
    arguments = (dlogprob, dentropy, hidden, weight, targets, lse, entropy, ctx.temperature)
    if stashed is not None:
        dweight = stashed.dweight
        dhidden = _run_token_logprob_stashed_backward(
            dweight, stashed.tile, *arguments, ctx.backend
        )
    else:
        dhidden, dweight = _run_token_logprob_backward(*arguments, ctx.backend)
    return dhidden, dweight, None, None, None, None


for _name in ("token_logprob", "token_logprob_stashed"):
    autograd(_name, _token_logprob_backward, _token_logprob_setup)


def _can_stash(hidden: Tensor, weight: Tensor, choice: str) -> bool:
    """Whether forward may lay out the gradient of weight: it will be wanted, of a plain tensor for
    which none is laid out yet, and outside of a compiled graph, which would copy what backward
    changes in place."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and type(weight) in backend.PLAIN_TENSORS
        and not torch.compiler.is_compiling()
        and id(weight) not in _stashed
        and backend.has_native("token_logprob_stashed", choice, hidden.dtype)
    )


def predicted_rows(hidden: Tensor, targets: Tensor) -> Tensor | None:
    """[n] rows with a target, where some have none: prompt tokens predict nothing and need not
    enter the largest product of all. None where all rows stay: under compile, in a CUDA graph or
    another tracing their number would depend on the data, and tensors of other types (DTensor) hold
    only a part."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or targets.device.type == "meta"
        or (targets.is_cuda and torch.cuda.is_current_stream_capturing())
        or type(hidden) not in backend.PLAIN_TENSORS
        or type(targets) not in backend.PLAIN_TENSORS
    ):
        return None
    rows = (targets >= 0).nonzero()[:, 0]
    return rows if rows.shape[0] < targets.shape[0] else None


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (nats) of each target under softmax(hidden @ weight.T / temperature).

    hidden [T, dim] and weight [V, dim], one floating dtype; targets [T] int32 or int64 below V,
    where a negative one means "not predicted": logprob 0, entropy 0, no gradient, and outside of
    compiled graphs no cost. Returns fp32 [T], or with entropy=True also each row's entropy (nats),
    [T]; both are differentiable, and logprob <= 0. The [T, V] logits are never held in memory
    (except by the reference, the oracle).
    ValueError on a mismatch, temperature <= 0, and (reference, CPU) on a target >= V.
    """
    check_floating("hidden", hidden)
    if hidden.dim() != 2:
        raise mismatch("hidden", "shape [T, dim]", hidden.shape)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise mismatch("weight", f"shape [V, {hidden.shape[1]}] with V > 0", weight.shape)
    check_like("weight", weight, hidden, "hidden", (weight.shape[0], hidden.shape[1]))
    check_index("targets", targets, hidden, "hidden", (hidden.shape[0],))
    if not temperature > 0:
        raise mismatch("temperature", "a number above 0", temperature)
    choice = backend.resolve(hidden)
    tokens, rows = targets.shape[0], predicted_rows(hidden, targets)
    if rows is not None:
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    run = _run_token_logprob_stashed if _can_stash(hidden, weight, choice) else _run_token_logprob
    logprob, entropies, *_ = run(hidden, weight, targets, temperature, entropy, choice)
    if rows is not None:
        logprob = logprob.new_zeros(tokens).index_copy(0, rows, logprob)
        if entropy:
            entropies = entropies.new_zeros(tokens).index_copy(0, rows, entropies)
    return (logprob, entropies) if entropy else logprob
