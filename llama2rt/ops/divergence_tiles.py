"""divergence over tiles of rows, for every backend: no kernel of its own yet.

A tile is a few rows with all of the vocabulary, so that one softmax makes a row's distribution
exactly, and its terms are differences of log-probabilities. Tiles over the vocabulary, as
`logprob_tiles` has them, would need every logit twice in forward: the mixture of two distributions
needs both normalised. What a tile costs is a walk through both weights and through the gradient of
one, which many rows share: as many as keep a buffer at ELEMENTS.
"""

import math

import torch
from torch import Tensor

from llama2rt.ops.tensors import wide_dtype

# Of one buffer, of which there are four at a time: 16 MiB each in fp32, 131 rows at V 32000.
ELEMENTS = 1 << 22


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, ELEMENTS // weight.shape[0])
    tokens = hidden.shape[0]
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[rows, V] in the wide dtype."""
    logits = torch.mm(hidden, weight.T).to(wide_dtype(hidden))
    if temperature != 1.0:
        logits /= temperature
    logits -= logits.logsumexp(-1, keepdim=True)
    return logits


def _mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """log(beta t + (1 - beta) s) of log-probabilities."""
    return torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Of each row: its divergence, and what backward needs, KL(s || t) of the reverse KL and
    KL(s || m) of a mixture; both in the wide dtype [T]."""
    value = torch.zeros(hidden.shape[0], dtype=wide_dtype(hidden), device=hidden.device)
    student_kl = torch.zeros_like(value)
    for rows in _tiles(hidden, weight):
        student = _log_probabilities(hidden[rows], weight, temperature)
        teacher = _log_probabilities(teacher_hidden[rows], teacher_weight, temperature)
        if beta == 0:
            p = teacher.exp()
            value[rows] = teacher.sub_(student).mul_(p).sum(-1)
            continue
        if beta == 1:
            p = student.exp()
            value[rows] = student.sub_(teacher).mul_(p).sum(-1)
            continue
        mixture = _mixture(student, teacher, beta)
        p = teacher.exp()
        value[rows] = teacher.sub_(mixture).mul_(p).sum(-1).mul_(beta)
        torch.exp(student, out=p)
        student_kl[rows] = student.sub_(mixture).mul_(p).sum(-1)
        value[rows] += student_kl[rows] * (1 - beta)
    return value, value.clone() if beta == 1 else student_kl


def divergence_backward(
    dvalue: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_kl: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight); the latter is summed over tiles in the wide dtype,
    which costs a second [V, dim] where weight is narrower."""
    wide = wide_dtype(hidden)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    acc = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for rows in _tiles(hidden, weight):
        student = _log_probabilities(hidden[rows], weight, temperature)
        teacher = _log_probabilities(teacher_hidden[rows], teacher_weight, temperature)
        if beta == 0:
            dlogits = student.exp_().sub_(teacher.exp_())
        else:
            p = student.exp()
            other = teacher if beta == 1 else _mixture(student, teacher, beta)
            dlogits = student.sub_(other).sub_(student_kl[rows, None]).mul_(p)
        # d value / d logit of s: s - t; s (log s - log t - KL); (1 - beta) s (log s - log m - KL).
        scale = (1 - beta if 0 < beta < 1 else 1) / temperature
        dlogits *= (dvalue[rows] * scale)[:, None]
        dlogits = dlogits.to(hidden.dtype)
        dhidden[rows] = torch.mm(dlogits, weight)
        if dlogits.dtype == wide:
            acc.addmm_(dlogits.T, hidden[rows])
        else:
            acc += torch.mm(dlogits.T, hidden[rows])
    return dhidden, acc.to(weight.dtype)
