"""Inputs of token_logprob and how its results are judged.

Yardstick in the same dtype: on logits of a GEMM in that dtype made fp32, the chosen one less
torch.logsumexp (as TRL's selective_log_softmax), and -sum p log p. `functions` has token_logprob
and token_logprob_backward as attributes, as every backend's module has.
"""

from collections.abc import Callable
from typing import Any

import torch
from numerics import draw, judge
from torch import Tensor

from llama2rt.ops import reference


def torch_formulation(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> list[Tensor]:
    """[logprob, entropy]."""
    logits = (hidden @ weight.T).float() / temperature
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    chosen = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return [torch.where(targets >= 0, x, 0.0) for x in (chosen, entropy)]


def check(
    functions: Any,
    tokens: int,
    depth: int,
    vocabulary: int,
    kind: str,
    dtype: torch.dtype,
    temperature: float,
    seed: int,
    *,
    device: str = "cpu",
    weight_scale: float = 0.3,
    arrange: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> None:
    """Forward and backward, with entropy and without, with a gradient through it and without.

    `arrange` gives weight other strides.
    """
    hidden = draw((tokens, depth), dtype, kind, seed).to(device)
    weight = draw((vocabulary, depth), dtype, "normal", seed + 1).to(device) * weight_scale
    weight = arrange(weight)
    targets = torch.randint(-1, vocabulary, (tokens,)).to(device)
    targets[-1] = vocabulary - 1
    upstream = draw((2, tokens), torch.float32, "normal", seed + 2).to(device)
    logprob, entropy, lse = functions.token_logprob(hidden, weight, targets, temperature, True)
    plain = functions.token_logprob(hidden, weight, targets, temperature, False)
    assert not plain[1].numel()

    wide = (hidden.double(), weight.double(), targets)
    exact = reference.token_logprob(*wide, temperature, True)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = torch_formulation(*leaves, targets, temperature)
    judge("logprob", logprob, exact[0], theirs[0].detach())
    judge("logprob without entropy", plain[0], exact[0], theirs[0].detach())
    judge("entropy", entropy, exact[1], theirs[1].detach())
    assert (logprob <= 0).all() and (entropy >= 0).all()

    for with_entropy in (False, True):
        ours = functions.token_logprob_backward(
            upstream[0],
            upstream[1] if with_entropy else None,
            hidden,
            weight,
            targets,
            lse,
            entropy if with_entropy else None,
            temperature,
        )
        expected = reference.token_logprob_backward(
            upstream[0].double(),
            upstream[1].double() if with_entropy else None,
            *wide,
            exact[2],
            exact[1] if with_entropy else None,
            temperature,
        )
        yardstick = torch.autograd.grad(
            theirs if with_entropy else theirs[:1],
            leaves,
            list(upstream) if with_entropy else [upstream[0]],
            retain_graph=True,
        )
        for name, *three in zip(("dhidden", "dweight"), ours, expected, yardstick, strict=True):
            judge(f"{name}, entropy {with_entropy}", *three, gradient=True)


def small(
    dtype: torch.dtype, *, tokens: int = 40, depth: int = 24, vocabulary: int = 150
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, targets)."""
    hidden, weight = torch.randn(tokens, depth).to(dtype), torch.randn(vocabulary, depth).to(dtype)
    return hidden, weight, torch.randint(-1, vocabulary, (tokens,))


def both(
    functions: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor,
) -> tuple[Tensor, ...]:
    """All results of forward and backward."""
    forward = functions.token_logprob(hidden, weight, targets, 0.7, True)
    _, entropy, lse = forward
    return *forward, *functions.token_logprob_backward(
        dlogprob, dentropy, hidden, weight, targets, lse, entropy, 0.7
    )


def same_bits(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
