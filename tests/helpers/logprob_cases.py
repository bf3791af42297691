"""Inputs of token_logprob and how its results are judged.

Yardstick in the same dtype: on logits of a GEMM in that dtype made fp32, the chosen one less
torch.logsumexp (as TRL's selective_log_softmax), and -sum p log p. `run` has token_logprob
and token_logprob_backward as attributes, as every backend's module has.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import draw, judge, judge_gradients, leaves_of, same_bits, wide
from torch import Tensor

from llama2rt import ops
from llama2rt.ops import reference


def torch_formulation(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, *, less_mean: bool = False
) -> list[Tensor]:
    """[logprob, entropy]; with `less_mean` the entropy is the log-sum-exp less the mean logit."""
    logits = (hidden @ weight.T).float() / temperature
    lse = logits.logsumexp(-1, keepdim=True)
    log_p = logits - lse
    chosen = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    p = log_p.exp()
    entropy = lse[:, 0] - (p * logits).sum(-1) if less_mean else -(p * log_p).sum(-1)
    return [torch.where(targets >= 0, x, 0.0) for x in (chosen, entropy)]


def check(
    run: Any,
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
    logprob, entropy, lse = run.token_logprob(hidden, weight, targets, temperature, True)
    plain = run.token_logprob(hidden, weight, targets, temperature, False)
    assert not plain[1].numel()

    inputs = (*wide(hidden, weight), targets)
    exact = reference.token_logprob(*inputs, temperature, True)
    leaves = leaves_of(hidden, weight)
    theirs = torch_formulation(*leaves, targets, temperature)
    judge("logprob", logprob, exact[0], theirs[0].detach())
    judge("logprob without entropy", plain[0], exact[0], theirs[0].detach())
    judge("entropy", entropy, exact[1], theirs[1].detach())
    assert (logprob <= 0).all() and (entropy >= 0).all()

    for with_entropy in (False, True):
        ours = run.token_logprob_backward(
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
            *inputs,
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
        judge_gradients("dhidden dweight", ours, expected, yardstick)


def small(
    dtype: torch.dtype, *, tokens: int = 40, depth: int = 24, vocabulary: int = 150
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, targets)."""
    hidden, weight = torch.randn(tokens, depth).to(dtype), torch.randn(vocabulary, depth).to(dtype)
    return hidden, weight, torch.randint(-1, vocabulary, (tokens,))


def both_directions(
    run: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor,
) -> tuple[Tensor, ...]:
    """All results of forward and backward."""
    forward = run.token_logprob(hidden, weight, targets, 0.7, True)
    _, entropy, lse = forward
    return *forward, *run.token_logprob_backward(
        dlogprob, dentropy, hidden, weight, targets, lse, entropy, 0.7
    )


# Promises beside the numbers.


def check_narrow_targets(run: Any, dtype: torch.dtype) -> None:
    """int32 gives what int64 gives."""
    hidden, weight, targets = small(dtype)
    upstream = torch.randn(2, len(targets))
    results = [both_directions(run, hidden, weight, t, *upstream) for t in (targets, targets.int())]
    assert same_bits(*results)


def check_targets_below_zero(run: Any, dtype: torch.dtype) -> None:
    """They are not predicted: 0, and no gradient through them; some of them, and all."""
    hidden, weight, targets = small(dtype)
    targets[3:9] = -100
    upstream = torch.randn(2, len(targets))
    skipped = targets < 0
    logprob, entropy, _, dhidden, _ = both_directions(run, hidden, weight, targets, *upstream)
    for values in (logprob, entropy, dhidden):
        assert not values[skipped].any() and values[~skipped].any()
    nothing = torch.full_like(targets, -1)
    logprob, entropy, lse, *gradients = both_directions(run, hidden, weight, nothing, *upstream)
    assert not any(x.any() for x in (logprob, entropy, *gradients)) and lse.isfinite().all()


def check_target_outside_the_vocabulary(run: Any, dtype: torch.dtype) -> None:
    """It gives NaN, which reaches no other token."""
    hidden, weight, targets = small(dtype)
    targets[5] = len(weight)
    logprob = run.token_logprob(hidden, weight, targets, 1.0, False)[0]
    assert logprob.isnan().nonzero().flatten().tolist() == [5]


def check_no_tokens(run: Any, dtype: torch.dtype) -> None:
    hidden, weight, targets = small(dtype, tokens=0)
    logprob, entropy, lse, dhidden, dweight = both_directions(
        run, hidden, weight, targets, *torch.empty(2, 0)
    )
    assert logprob.shape == entropy.shape == lse.shape == (0,)
    assert dhidden.shape == (0, 24) and not dweight.any()


def certain(run: Any, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """(logprob, lse, hidden, weight, targets) where the likeliest token is the target and cold
    sampling leaves the others next to nothing: never above 0, no entropy below 0."""
    hidden, weight, _ = (x.to(device) for x in small(dtype, depth=64))
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    logprob, entropy, lse = run.token_logprob(hidden, weight, targets, 0.05, True)
    assert (logprob <= 0).all() and (logprob > -1e-3).float().mean() > 0.5
    assert (entropy >= 0).all()
    return logprob, lse, hidden, weight, targets


def check_gradient_of_certain_targets(run: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """Where one logit is all, only its rivals' gradient is left: an ulp of lse would give 1e-3."""
    logprob, lse, *inputs = certain(run, dtype, device)
    dhidden, _ = run.token_logprob_backward(torch.ones_like(lse), None, *inputs, lse, None, 0.05)
    hidden, weight, _ = inputs
    exact = (hidden.double() @ weight.double().T / 0.05).log_softmax(-1)
    sure = exact.max(-1).values > -1e-9
    assert sure.any() and not logprob[sure].any()
    assert dhidden[sure].abs().max() < 1e-5


def check_weight_gradient_is_summed_in_fp32(
    run: Any, rows: int = 1, tiles: int = 257, large: float = 1024.0, device: str = "cpu"
) -> None:
    """The first tile of `rows` rows contributes much (`large` a row), the others too little for a
    bf16 sum to notice each: it would lose 3 % (Liger #1323)."""
    hidden = torch.full((tiles * rows, 4), 0.125, dtype=torch.bfloat16, device=device)
    hidden[:rows] = large
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(tiles * rows, dtype=torch.int64, device=device)
    lse = torch.full((tiles * rows,), math.log(8), device=device)
    _, dweight = run.token_logprob_backward(
        torch.ones_like(lse), None, hidden, weight, targets, lse, None, 1.0
    )
    total = rows * (large + (tiles - 1) * 0.125)
    assert dweight[0, 0].item() == pytest.approx(total * 7 / 8, rel=0.004)
    assert dweight[1, 0].item() == pytest.approx(-total / 8, rel=0.004)


def check_through_the_ops(backend: str) -> None:
    """The op and its gradients on `backend`, against the reference in fp64."""
    hidden, weight, targets = small(torch.float32)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with ops.use(name):
            logprob, entropy = ops.token_logprob(*leaves, targets, temperature=1.3, entropy=True)
        gradients = torch.autograd.grad((logprob * entropy).sum(), leaves)
        results.append(wide(logprob, entropy, *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
