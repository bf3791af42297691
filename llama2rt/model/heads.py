"""A scalar in place of the next token: reward models (section 3.2.2) and PPO's critic."""

import torch
from torch import Tensor, nn

from llama2rt.model.config import LlamaConfig
from llama2rt.model.llama import Llama


class ScalarModel(nn.Module):
    """A Llama whose output matrix is replaced by a regression head: one number per token.

    `.backbone` is a Llama without `output` (only its `hidden` is usable), `.head` a Linear(dim, 1)
    without bias, as in transformers' LlamaForSequenceClassification with one label.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Llama(config, device, dtype)
        self.backbone.register_parameter("output", None)
        self.head = nn.Linear(config.dim, 1, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> "ScalarModel":
        """Fresh weights from a seed (see Llama.initialize); returns the model."""
        self.backbone.initialize(seed)
        return self._initialize_head(seed)

    @torch.no_grad()
    def _initialize_head(self, seed: int) -> "ScalarModel":
        # 1/sqrt(dim + 1) keeps the first scores near unit scale for a normed hidden state
        # (Stiennon et al. 2020, appendix B.1); their mean over the head's draws is zero.
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.head.weight.shape, generator=generator)
        self.head.weight.copy_(weight / (self.config.dim + 1) ** 0.5)
        return self

    @classmethod
    @torch.no_grad()
    def from_llama(cls, llama: Llama, seed: int = 0) -> "ScalarModel":
        """A scalar model that starts from a copy of a language model's weights, with a new head."""
        weight = llama.embedding.weight
        model = cls(llama.config, weight.device, weight.dtype)
        weights = {k: v for k, v in llama.state_dict().items() if k != "output"}
        model.backbone.load_state_dict(weights)
        return model._initialize_head(seed)

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """fp32 [T]: the value at every token; a response's score is the one at its last token."""
        hidden = self.backbone.hidden(tokens, positions, cu_seqlens)
        # One column: an elementwise product in fp32 is as cheap as a GEMM and rounds less.
        return (hidden.float() * self.head.weight.float()).sum(-1)


def last_token(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B]: the value at each document's last token; ValueError for an empty document (on CPU)."""
    ends = cu_seqlens[1:].long()
    if cu_seqlens.device.type == "cpu" and bool((ends <= cu_seqlens[:-1]).any()):
        raise ValueError("cu_seqlens: expected documents with at least one token, got an empty one")
    return values.index_select(0, ends - 1)
