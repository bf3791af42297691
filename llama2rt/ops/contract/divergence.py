"""divergence: how far a model's next-token distributions are from a teacher's, row by row, without
the logits of either in memory."""

import math
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend
from llama2rt.ops.checks import check_floating, check_index, check_like, mismatch
from llama2rt.ops.contract.token_logprob import predicted_rows
from llama2rt.ops.registration import autograd, define
from llama2rt.ops.tensors import empty_like, wide_dtype


def _divergence_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    value = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden))
    return value, empty_like(value)


_run_divergence = define(
    "divergence(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight,"
    " float beta, float temperature, str backend) -> (Tensor, Tensor)",
    _divergence_fake,
)
_run_divergence_backward = define(
    "divergence_backward(Tensor dvalue, Tensor hidden, Tensor weight, Tensor teacher_hidden,"
    " Tensor teacher_weight, Tensor student_kl, float beta, float temperature, str backend)"
    " -> (Tensor, Tensor)",
    lambda dvalue, hidden, weight, *_: (empty_like(hidden), empty_like(weight)),
)


def _divergence_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.beta, ctx.temperature, ctx.backend = inputs
    _, student_kl = output
    ctx.save_for_backward(*tensors, student_kl)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(student_kl)


def _divergence_backward(ctx: Any, dvalue: Tensor | None, _: Tensor | None) -> tuple:
    if dvalue is None:
        return (None,) * 7
    dhidden, dweight = _run_divergence_backward(
        dvalue, *ctx.saved_tensors, ctx.beta, ctx.temperature, ctx.backend
    )
    return dhidden, dweight, None, None, None, None, None


autograd("divergence", _divergence_backward, _divergence_setup)


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence (nats) of the student's distribution s from the teacher's t in each row, fp32 [T].

    s = softmax(hidden @ weight.T / temperature), t likewise of the teacher's (Hinton et al., 2015,
    arXiv 1503.02531). beta 0 is the forward KL(t || s), of which Hinton's cross-entropy with soft
    targets is KL plus a constant; 1 the reverse KL(s || t) (MiniLLM, arXiv 2306.08543); between
    them the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1),
    beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s.

    hidden [T, dim], weight [V, dim], teacher_hidden [T, dim'], teacher_weight [V, dim'], one
    floating dtype; targets [T] int32 or int64, of which only the sign is read: a negative one means
    "not predicted", with divergence 0, no gradient, and outside of compiled graphs no cost. The
    gradient goes to hidden and weight; it is that of the value, not times temperature^2. Logits
    exist for a few rows at a time, never [T, V] (but for the reference, the oracle).
    ValueError on a mismatch, vocabularies of different size, a teacher that wants a gradient, and
    DTensors, whose vocabulary may be cut over ranks.
    """
    check_floating("hidden", hidden)
    given = {"hidden": hidden, "teacher_hidden": teacher_hidden}
    for name, tensor in given.items():
        if tensor.dim() != 2:
            raise mismatch(name, "shape [T, dim]", tensor.shape)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise mismatch("weight", f"shape [V, {hidden.shape[1]}] with V > 0", weight.shape)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    teacher_dim = teacher_hidden.shape[1]
    check_like("weight", weight, hidden, "hidden", (vocabulary, hidden.shape[1]))
    check_like("teacher_hidden", teacher_hidden, hidden, "hidden", (tokens, teacher_dim))
    check_like("teacher_weight", teacher_weight, hidden, "hidden", (vocabulary, teacher_dim))
    check_index("targets", targets, hidden, "hidden", (tokens,))
    if not 0 <= beta <= 1:
        raise mismatch("beta", "a number from 0 to 1", beta)
    if not 0 < temperature < math.inf:
        raise mismatch("temperature", "a number above 0", temperature)
    if torch.is_grad_enabled() and (teacher_hidden.requires_grad or teacher_weight.requires_grad):
        raise mismatch("teacher_hidden", "a teacher without gradients", "one that wants them")
    _require_plain(hidden, weight, teacher_hidden, teacher_weight)
    choice = backend.resolve(hidden)
    rows = predicted_rows(hidden, targets)
    if rows is not None:
        hidden, teacher_hidden = hidden.index_select(0, rows), teacher_hidden.index_select(0, rows)
    value, _ = _run_divergence(
        hidden, weight, teacher_hidden, teacher_weight, beta, temperature, choice
    )
    if rows is not None:
        return value.new_zeros(tokens).index_copy(0, rows, value)
    return torch.where(targets >= 0, value, 0.0)


def _require_plain(*tensors: Tensor) -> None:
    for tensor in tensors:
        # Named, not imported: torch.distributed.tensor takes a second, and a plain run has none.
        if type(tensor).__name__ == "DTensor":
            raise mismatch("weight", "a whole vocabulary on every rank", "a DTensor")
