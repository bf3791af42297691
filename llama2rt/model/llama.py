"""The transformer of Llama 2 (section 2.2) on packed documents: no padding, masks or batch axis.

Knows nothing of parallelism, precision policy, optimisers or checkpoint formats. Head counts are
read from tensor shapes, so a layer sharded over heads just works. LLaMA has no dropout.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama2rt import ops
from llama2rt.model.config import LlamaConfig
from llama2rt.ops.embedding import embedding
from llama2rt.ops.linear import linear


class Cache(Protocol):
    """What generation plugs into a forward pass: attention over stored keys and values."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] after rotary embedding -> [T, Hq, D]."""
        ...


class Embedding(nn.Embedding):
    """torch's, with the lookup of `ops.embedding`, whose gradient is summed in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class Linear(nn.Linear):
    """torch's, with the product of `ops.linear`, which knows a faster one for decoding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normed sum, sum) of x and the residual stream, which None starts."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class Block(nn.Module):
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
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The feed-forward output and the residual stream that the next norm adds it to."""
        heads = (x.shape[0], -1, self.head_dim)
        x, residual = self.attention_norm(x, residual)
        q, k = ops.rope(self.query(x).view(heads), self.key(x).view(heads), cos, sin, positions)
        v = self.value(x).view(heads)
        if cache is None:
            x = ops.attention(q, k, v, cu_seqlens)
        else:
            x = cache.attend(self.layer, q, k, v)
        x, residual = self.ffn_norm(self.attention_output(x.flatten(1)), residual)
        return self.down(ops.swiglu(self.gate(x), self.up(x))), residual


class Llama(nn.Module):
    """A LLaMA-2-family language model over packed tokens.

    A batch is tokens [T] int64, positions [T] (each document's own, from 0) and cu_seqlens [B+1]
    int32, the documents' offsets. `initialize` or a checkpoint fills the weights.
    `torch.compile(fullgraph=True)` takes `hidden`, and `forward`.
    """

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
        if config.tied:
            self.output = self.embedding.weight
        else:
            self.output = nn.Parameter(torch.empty(config.vocab_size, config.dim, **factory))
        self._rotary: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> "Llama":
        """Fill the weights: normal 0.02, the two projections into the residual stream scaled by
        1/sqrt(2 * layers) (GPT-2, section 2.3), norms 1. The same seed gives the same weights on
        any device and, up to rounding, in any dtype. Returns the model."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = 0.02
            if name.endswith(("attention_output.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.layers)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

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

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """[T, dim] after the final norm. With a cache, `cache.attend(layer, q, k, v)` stands in for
        attention over the batch itself."""
        cos, sin = self.rotary(tokens.device)
        x, residual = self.embedding(tokens), None
        for block in self.blocks:
            x, residual = block(x, residual, cos, sin, positions, cu_seqlens, cache)
        return self.norm(x, residual)[0]

    def logits(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, V] logits: for tests and small uses; training never holds them."""
        return linear(self.hidden(tokens, positions, cu_seqlens), self.output)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probability fp32 [T] of each target (0 where targets < 0), and entropy [T] if asked.

        targets [T]: the token that each position must predict. See ops.token_logprob.
        """
        hidden = self.hidden(tokens, positions, cu_seqlens)
        if torch.compiler.is_compiling():
            return ops.token_logprob(
                hidden, self.output, targets, temperature=temperature, entropy=entropy
            )
        # Prompt tokens predict nothing: their rows are dropped before the largest GEMM of all.
        # Not under compile, where the number of rows would depend on the data.
        rows = (targets >= 0).nonzero()[:, 0]
        if rows.shape[0] < targets.shape[0]:
            hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
        result = ops.token_logprob(
            hidden, self.output, targets, temperature=temperature, entropy=entropy
        )
        if rows.shape[0] == tokens.shape[0]:
            return result
        if isinstance(result, tuple):
            logprob, spread = result
            return _scatter(logprob, rows, tokens), _scatter(spread, rows, tokens)
        return _scatter(result, rows, tokens)


def _scatter(values: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """values at `rows` of a vector as long as tokens, 0 elsewhere."""
    return values.new_zeros(tokens.shape[0]).index_copy(0, rows, values)
