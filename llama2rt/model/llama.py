"""The language model: a `Transformer` and the output layer that predicts the next token."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llama2rt import ops
from llama2rt.model.config import LlamaConfig
from llama2rt.model.shared_prefix import SharedKeys, documents
from llama2rt.model.tails import Tails
from llama2rt.model.transformer import Linear, Transformer, fill, fresh_weights


class Llama(nn.Module):
    """A LLaMA-2-family language model over packed tokens.

    A batch is tokens [T] int64, positions [T] (each document's own, from 0) and cu_seqlens [B+1]
    int32, the documents' offsets, and, where documents share the tokens they begin with, the keys
    that they attend to. `initialize` or a checkpoint fills the weights; `output.weight` is
    [V, dim], and `transformer.embedding.weight` itself where the config ties the two.
    `torch.compile(fullgraph=True)` takes `hidden`, and `forward`. Its state dict is named by
    modules, as FSDP2 and tensor-parallel plans need it; files have names of their own
    (`checkpoint.native.stored_name`).
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        here = torch.get_default_device() if device is None else device
        # Before the transformer: a seed's weights, and the order in which an optimizer sums the
        # gradient norm, follow the order of the parameters. And without torch's own random weights,
        # which would move its global generator. (`skip_init` does that too, by a call that imports
        # torch's compiler.)
        self.output = Linear(config.dim, config.vocab_size, bias=False, device="meta", dtype=dtype)
        if not config.tied:
            empty = torch.empty(self.output.weight.shape, device=here, dtype=dtype)
            self.output.weight = nn.Parameter(empty)
        self.transformer = Transformer(config, device, dtype)
        if config.tied:
            self.output.weight = self.transformer.embedding.weight

    def initialize(self, seed: int = 0) -> "Llama":
        """Fill the weights with `fresh_weights`. The same seed gives the same weights on any device
        and, up to rounding, in any dtype. Returns the model."""
        fill(self, self.fresh_weights(seed))
        return self

    def fresh_weights(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, fp32 values) one after the other, as `transformer.fresh_weights` draws
        them: also for a model on the meta device."""
        return fresh_weights(self, self.config.layers, seed)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        keys: SharedKeys | None = None,
    ) -> Tensor:
        """[T, dim] after the final norm."""
        return self.transformer(tokens, positions, *documents(cu_seqlens, keys))

    def logits(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, V] logits: for tests and small uses; training never holds them."""
        return self.output(self.hidden(tokens, positions, cu_seqlens))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        *,
        keys: SharedKeys | None = None,
        tails: Tails | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        teacher: tuple[Tensor, Tensor] | None = None,
        beta: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probability fp32 [T] of each target (0 where targets < 0), and entropy [T] if asked.

        targets [T]: the token that each position must predict. See `ops.token_logprob`. tails: the
        ends of documents that hold all of these positions; no others are computed in the last
        block. teacher: hidden states [T, dim'] of another model that has read the same tokens, and
        its output weight [V, dim']: then the result is how far this model's distributions are from
        its, see `ops.divergence`.
        """
        count = len(tokens)
        layout = documents(cu_seqlens, keys, tails)
        if tails is not None:
            targets = tails.take(targets)
        if teacher is not None:
            hidden, weight = teacher
            if tails is not None:
                hidden = tails.take(hidden)
            apart = ops.divergence(
                self.transformer(tokens, positions, *layout),
                self.output.weight,
                hidden,
                weight,
                targets,
                beta=beta,
                temperature=temperature,
            )
            return apart if tails is None else tails.spread(apart, count)
        # Not named here: the op drops prompt tokens' rows, and with them the hidden states.
        found = ops.token_logprob(
            self.transformer(tokens, positions, *layout),
            self.output.weight,
            targets,
            temperature=temperature,
            entropy=entropy,
        )
        if tails is None:
            return found
        if isinstance(found, Tensor):
            return tails.spread(found, count)
        logprob, entropies = found
        return tails.spread(logprob, count), tails.spread(entropies, count)
