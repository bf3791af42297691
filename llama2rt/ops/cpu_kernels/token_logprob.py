"""token_logprob: the kernels of one tile of logits, between products by torch."""

import torch
from torch import Tensor

from llama2rt import _cpu  # after torch (see CMakeLists.txt)
from llama2rt.ops import logprob_tiles
from llama2rt.ops.cpu_kernels.linear import add_product, add_weight_gradient, weight_gradient
from llama2rt.ops.logprob_tiles import Statistics, Upstream
from llama2rt.ops.reference import check_targets


class _Kernels:
    """`logprob_tiles.Kernels` on this processor."""

    def fold(
        self, logits: Tensor, targets: Tensor, first: int, scale: float, statistics: Statistics
    ) -> None:
        _cpu.token_logprob(logits, targets, first, scale, *statistics, torch.get_num_threads())

    def differentiate(
        self,
        logits: Tensor,
        dlogits: Tensor,
        targets: Tensor,
        first: int,
        scale: float,
        upstream: Upstream,
    ) -> None:
        tile = logits, dlogits, targets, first, scale
        _cpu.token_logprob_backward(*tile, *upstream, torch.get_num_threads())

    def weight_gradient(self, out: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        if _own_products(dlogits.dtype):
            weight_gradient(dlogits, hidden, out)
        else:
            torch.mm(dlogits.T, hidden, out=out)

    def add_weight_gradient(self, acc: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        if _own_products(dlogits.dtype):
            add_weight_gradient(acc, dlogits, hidden)
        else:
            add_product(acc, dlogits.T, hidden)

    def add_hidden_gradient(self, acc: Tensor, dlogits: Tensor, weight: Tensor) -> None:
        add_product(acc, dlogits, weight)


def _own_products(dtype: torch.dtype) -> bool:
    """Whether `_cpu` multiplies matrices of this dtype faster than torch does, whose products use
    AMX where there is one."""
    return dtype == torch.bfloat16 and _cpu.isa() == "avx512bf16" and not _cpu.has_amx()


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D] -> (logprob [T] fp32, entropy [T] or [0], log-sum-exp [T])."""
    check_targets(targets, weight.shape[0])
    return logprob_tiles.forward(
        _Kernels(), logprob_tiles.CPU, hidden, weight, targets, temperature, entropy
    )


def token_logprob_backward(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight)."""
    arguments = dlogprob, dentropy, hidden, weight, targets, lse, entropy, temperature
    return logprob_tiles.backward(_Kernels(), logprob_tiles.CPU, *arguments)


def token_logprob_stashed(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_logprob's results, and the two memories with logits for backward: that of weight's
    gradient and a tile."""
    check_targets(targets, weight.shape[0])
    stash = logprob_tiles.Stash.empty(hidden, weight, logprob_tiles.CPU)
    arguments = hidden, weight, targets, temperature, entropy, stash
    return *logprob_tiles.forward(_Kernels(), logprob_tiles.CPU, *arguments), *stash


def token_logprob_stashed_backward(
    dweight: Tensor,
    tile: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """token_logprob_backward's gradient of hidden; dweight becomes the gradient of weight."""
    stash = logprob_tiles.Stash(dweight, tile)
    arguments = dlogprob, dentropy, hidden, weight, targets, lse, entropy, temperature, stash
    return logprob_tiles.backward(_Kernels(), logprob_tiles.CPU, *arguments)[0]
