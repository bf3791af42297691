"""The transformer of Llama 2 (section 2.2) on packed documents: no padding, masks or batch axis.

Knows nothing of parallelism, precision policy, optimisers or checkpoint formats, but leaves them
three seams. Every weight belongs to a module that a plan can name (`blocks.3.query`); a block asks
an `Attention` for its attention, whatever that attends to; and `Transformer.run_block` decides how
a block is run. Head counts are read from tensor shapes, so a layer sharded over heads just works.
LLaMA has no dropout.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama2rt import ops
from llama2rt.model.config import LlamaConfig
from llama2rt.ops.embedding import embedding
from llama2rt.ops.linear import linear


class Attention(Protocol):
    """What the tokens of one forward pass attend to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], or of an `Ending` [R, Hq, D], k and v [T, Hkv, D], after rotary embedding
        -> as q."""
        ...


@dataclass(frozen=True)
class PackedAttention:
    """Each token attends to its own document's tokens up to itself."""

    cu_seqlens: Tensor
    """int32 [B+1], offsets of the documents' queries"""
    cu_seqlens_k: Tensor | None = None
    """int32 [B+1], of their keys, of which the queries' are the last; None for the same"""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, self.cu_seqlens, cu_seqlens_k=self.cu_seqlens_k)


@dataclass(frozen=True)
class Ending:
    """What the last block computes where not all hidden states are read (`model.tails`)."""

    rows: Tensor
    """int64 [R], of the tokens that queries and all that follows are computed of"""
    attention: Attention
    """what these attend to"""


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one forward pass.

    No tuple: what casts a module's tensor arguments to bf16 must not find the fp32 tables.
    """

    cos: Tensor
    """fp32 [context, head_dim / 2]"""
    sin: Tensor
    """fp32 [context, head_dim / 2]"""
    positions: Tensor
    """[T], each token's row of the tables"""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope(q, k, self.cos, self.sin, self.positions)

    def rotate_rows(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [R, H, D] of the tokens `rows` [R], None for all."""
        positions = self.positions if rows is None else self.positions.index_select(0, rows)
        nothing = x.detach()[:, :0]  # no keys beside these queries, or no queries beside these keys
        return ops.rope(x, nothing, self.cos, self.sin, positions)[0]


class Embedding(nn.Embedding):
    """torch's, with the lookup of `ops.embedding`, whose gradient is summed in fp32."""

    def reset_parameters(self) -> None:
        # Random numbers on the meta device cost 1.6 s: torch imports its compiler for them.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class Linear(nn.Linear):
    """torch's, with the product of `ops.linear`, which knows a faster one for decoding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of the sum, sum) of x and the residual stream, which None starts."""
    if residual is None:
        return ops.rms_norm(x, weight, eps), x
    return ops.add_rms_norm(x, residual, weight, eps)


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019), together with the residual addition in front of it."""

    def __init__(self, dim: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normed sum, sum) of x and the residual stream, which None starts."""
        return norm(x, residual, self.weight, self.eps)


class Block(nn.Module):
    """Attention and a SwiGLU feed-forward layer, each behind a norm."""

    def __init__(self, config: LlamaConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        dim, hidden, kv_dim = config.dim, config.ffn_hidden, config.kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.attention_norm = Norm(dim, config.norm_eps, **factory)
        self.query = Linear(dim, dim, bias=False, **factory)
        self.key = Linear(dim, kv_dim, bias=False, **factory)
        self.value = Linear(dim, kv_dim, bias=False, **factory)
        self.attention_output = Linear(dim, dim, bias=False, **factory)
        self.ffn_norm = Norm(dim, config.norm_eps, **factory)
        self.gate = Linear(dim, hidden, bias=False, **factory)
        self.up = Linear(dim, hidden, bias=False, **factory)
        self.down = Linear(hidden, dim, bias=False, **factory)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: Rotary,
        attention: Attention,
        ending: Ending | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The feed-forward output and the residual stream that the next norm adds it to: [T, dim],
        or [R, dim] of an `ending`."""
        x, residual = self.attention_norm(x, residual)
        # Counted after the norm, which may have gathered tokens that the residual stream shards.
        heads = (x.shape[0], -1, self.head_dim)
        k, v = self.key(x).view(heads), self.value(x).view(heads)
        if ending is None:
            q, k = rotary.rotate(self.query(x).view(heads), k)
        else:
            attention, rows = ending.attention, ending.rows
            # Not `view`: there may be no rows.
            q = self.query(x.index_select(0, rows)).unflatten(1, (-1, self.head_dim))
            q, k = rotary.rotate_rows(q, rows), rotary.rotate_rows(k)
            residual = residual.index_select(0, rows)
        x = attention.attend(self.layer, q, k, v)
        x, residual = self.ffn_norm(self.attention_output(x.flatten(1)), residual)
        return self.down(ops.swiglu(self.gate(x), self.up(x))), residual


BlockRunner = Callable[..., tuple[Tensor, Tensor]]
"""(block, *its arguments) -> what the block returns"""


def run_plainly(block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The `BlockRunner` that keeps all activations for the backward pass."""
    return block(*inputs)


class Transformer(nn.Module):
    """Embedding, blocks and final norm: from tokens to hidden states."""

    run_block: BlockRunner
    """how each block is run, e.g. with its activations recomputed (train.recompute)"""

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, **factory)
        self.blocks = nn.ModuleList(
            Block(config, layer, **factory) for layer in range(config.layers)
        )
        self.norm = Norm(config.dim, config.norm_eps, **factory)
        self.run_block = run_plainly
        self._rotary: tuple[Tensor, Tensor] | None = None

    def rotary(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin tables, fp32 [context, head_dim / 2]; kept out of the state dict."""
        if self._rotary is None or self._rotary[0].device != device:
            self._rotary = self._build_rotary(device)
        return self._rotary

    def _build_rotary(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # the first use may be sampling, the next one training
            half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
            frequency = 1.0 / self.config.rope_theta ** (half / self.config.head_dim)
            position = torch.arange(self.config.context, dtype=torch.float32, device=device)
            angle = torch.outer(position, frequency)
            return angle.cos(), angle.sin()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        ending: Ending | None = None,
    ) -> Tensor:
        """tokens [T] int64, positions [T] -> [T, dim] after the final norm, or [R, dim] of an
        `ending`."""
        rotary = Rotary(*self.rotary(tokens.device), positions)
        x, residual = self.embedding(tokens), None
        *blocks, last = self.blocks
        for block in blocks:
            x, residual = self.run_block(block, x, residual, rotary, attention)
        x, residual = self.run_block(last, x, residual, rotary, attention, ending)
        return self.norm(x, residual)[0]


def fresh_weights(module: nn.Module, layers: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 values on the CPU) for each parameter of a transformer or of a model around one:
    normal 0.02, the two projections into the residual stream scaled by 1/sqrt(2 * layers) (GPT-2,
    section 2.3), norms 1. Drawn in the order of the parameters, of which only the shape counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape)
            continue
        std = 0.02
        if name.endswith(("attention_output.weight", "down.weight")):
            std /= math.sqrt(2 * layers)
        yield name, torch.randn(parameter.shape, generator=generator) * std


@torch.no_grad()
def fill(module: nn.Module, values: Iterator[tuple[str, Tensor]]) -> None:
    """Give parameters their values by name."""
    for name, value in values:
        module.get_parameter(name).copy_(value)
