"""A scalar in place of the next token: reward models (section 3.2.2) and PPO's critic."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama2rt.model.config import LlamaConfig
from llama2rt.model.llama import Llama
from llama2rt.model.shared_prefix import SharedKeys, documents
from llama2rt.model.tails import Tails, last_rows
from llama2rt.model.transformer import Transformer, fill, fresh_weights


def value(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, dim], weight [1, dim] -> fp32 [T]."""
    # One column: an elementwise product in fp32 is as cheap as a GEMM and rounds less.
    return (hidden.float() * weight.float()).sum(-1)


class Head(nn.Linear):
    """A Linear of one output, in fp32: [T, dim] -> [T]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return value(hidden, self.weight)


@dataclass(frozen=True)
class Normalization:
    """How a reward model's scores are shifted and scaled where they become rewards, so that two
    models' rewards compare: (score - mean) / std. ValueError for numbers that cannot do that.

    No weight changes: transformers' head has no bias to put a mean into, and the probability that
    one answer is better than another is a sigmoid of the difference of scores as they are.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"expected a finite mean and a positive std, got {self}")

    @classmethod
    def over(cls, scores: Tensor) -> "Normalization":
        """What gives `scores` [n] mean 0 and standard deviation 1, in fp64; scores that are all
        equal have no scale, and keep theirs. ValueError for one that is not finite, or for none."""
        wide = scores.double()
        mean = wide.mean()
        std = float((wide - mean).square().mean().sqrt())
        return cls(float(mean), 1.0 if std == 0 else std)

    def of(self, scores: Tensor) -> Tensor:
        """Scores of any shape and floating-point dtype -> the same."""
        return (scores - self.mean) / self.std


class ScalarModel(nn.Module):
    """A transformer under a regression head: one number per token.

    `head` is a Linear(dim, 1) without bias, as in transformers' LlamaForSequenceClassification with
    one label. `normalization` is what model folders keep beside it; the model's own values are
    without.
    """

    normalization: Normalization
    unread: int | None
    """a token that scores are not read at where texts end with it, as of a model of transformers
    whose pad token ends answers too: that one was trained to be read at the token before"""

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.normalization, self.unread = Normalization(), None
        self.transformer = Transformer(config, device, dtype)
        self.head = Head(config.dim, 1, bias=False, device=device, dtype=dtype)

    def initialize(self, seed: int = 0) -> "ScalarModel":
        """Fresh weights from a seed (see Llama.initialize); returns the model."""
        fill(self, self.fresh_weights(seed))
        return self

    def fresh_weights(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, fp32 values), of the transformer as in `Llama.fresh_weights`."""
        for name, values in fresh_weights(self.transformer, self.config.layers, seed):
            yield f"transformer.{name}", values
        yield "head.weight", self._fresh_head(seed)

    def _fresh_head(self, seed: int) -> Tensor:
        # 1/sqrt(dim + 1) keeps the first scores near unit scale for a normed hidden state
        # (Stiennon et al. 2020, appendix B.1); their mean over the head's draws is zero.
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.head.weight.shape, generator=generator)
        return weight / (self.config.dim + 1) ** 0.5

    @classmethod
    def from_llama(cls, llama: Llama, seed: int = 0) -> "ScalarModel":
        """A scalar model that starts from a copy of a language model's weights, with a new head. Of
        a model on the meta device the head alone has values, on the CPU."""
        weight = llama.transformer.embedding.weight
        model = cls(llama.config, weight.device, weight.dtype)
        model.transformer.load_state_dict(llama.transformer.state_dict())
        if weight.is_meta:
            model.head.to_empty(device="cpu")
        fill(model, iter([("head.weight", model._fresh_head(seed))]))
        return model

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        keys: SharedKeys | None = None,
    ) -> Tensor:
        """[T, dim] after the final norm."""
        return self.transformer(tokens, positions, *documents(cu_seqlens, keys))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        keys: SharedKeys | None = None,
        *,
        tails: Tails | None = None,
    ) -> Tensor:
        """fp32 [T]: the value at every token, or those of `tails`, where others may be 0; a
        response's score is the one at its last token."""
        values = self.head(self.transformer(tokens, positions, *documents(cu_seqlens, keys, tails)))
        return values if tails is None else tails.spread(values, len(tokens))


def last_token(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B]: the value at each document's last token; ValueError for an empty document (on CPU)."""
    return values.index_select(0, last_rows(cu_seqlens))
