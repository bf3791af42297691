"""token_logprob: the kernels of one tile of logits, between products by cuBLAS."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama2rt.ops import logprob_tiles
from llama2rt.ops.composed import tiles
from llama2rt.ops.cuda_kernels.device import Device
from llama2rt.ops.logprob_tiles import Statistics, Upstream

# A forward tile in bf16 is at most 32 MiB, so that the kernel finds most of it in the L2 cache (40
# MB on an A100, 50 on an H200), and 512 blocks of a product, four rounds over the multiprocessors.
FORWARD_ROWS, FORWARD_COLUMNS = 4096, 4096
# Narrower, a product would be too small for the GPU.
NARROWEST = 2048
# Elements of dweight in fp32 at one time: 32 MiB stay in L2 until they are rounded.
PART = 1 << 23


def _eighth(vocabulary: int) -> int:
    return max(NARROWEST, vocabulary // 8)


def _product_to_fp32(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta out + a @ b, summed in fp32 to the end: a and b may be of a narrower dtype."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:  # the emulator: torch has this product for GPUs only
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


@dataclass(frozen=True)
class _Kernels:
    """`logprob_tiles.Kernels` on a CUDA device."""

    on: Device

    def fold(
        self, logits: Tensor, targets: Tensor, first: int, scale: float, statistics: Statistics
    ) -> None:
        tile = logits, targets, first, scale
        self.on.native.token_logprob(*tile, *statistics, *self.on.stream(logits))

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
        self.on.native.token_logprob_backward(*tile, *upstream, *self.on.stream(logits))

    def weight_gradient(self, out: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        """In parts through fp32: cuBLAS may add the parts of a bf16 result up in bf16."""
        if out.dtype == torch.float32:
            torch.mm(dlogits.T, hidden, out=out)
            return
        height = max(1, PART // out.shape[1])
        sums = out.new_empty(min(height, out.shape[0]), out.shape[1], dtype=torch.float32)
        for part in tiles(out.shape[0], height):
            some = sums[: part.stop - part.start]
            _product_to_fp32(some, dlogits.T[part], hidden, beta=0)
            out[part] = some

    def add_weight_gradient(self, acc: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        _product_to_fp32(acc, dlogits.T, hidden, beta=1)

    def add_hidden_gradient(self, acc: Tensor, dlogits: Tensor, weight: Tensor) -> None:
        _product_to_fp32(acc, dlogits, weight, beta=1)


def token_logprob(
    on: Device, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D] -> (logprob [T] fp32, entropy [T] or [0], log-sum-exp [T]).

    Extra memory: one tile of logits in hidden's dtype; for fp32 one of backward's tiles.
    """
    columns = _eighth(weight.shape[0])
    size = logprob_tiles.Tiles(max(1, hidden.shape[0]), columns)
    if hidden.dtype != torch.float32:
        # Backward's logits may come from another kernel of cuBLAS, which adds in another order. In
        # fp32 that shows: an ulp of a logit of 500 is 3e-5 of its probability, of 1 itself.
        columns = min(FORWARD_COLUMNS, columns)
        size = logprob_tiles.Tiles(FORWARD_ROWS, columns)
    arguments = hidden, weight, targets, temperature, entropy
    return logprob_tiles.forward(_Kernels(on), size, *arguments)


def token_logprob_backward(
    on: Device,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight).

    Extra memory: logits for 1/8 of the vocabulary (or `NARROWEST`) in hidden's dtype, the gradient
    of hidden in fp32, and unless hidden is fp32 32 MiB for that of weight.
    """
    columns = _eighth(weight.shape[0])
    size = logprob_tiles.Tiles(max(1, hidden.shape[0]), columns)
    arguments = dlogprob, dentropy, hidden, weight, targets, lse, entropy, temperature
    return logprob_tiles.backward(_Kernels(on), size, *arguments)
