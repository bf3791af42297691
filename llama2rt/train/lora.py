"""The table `[lora]` of a recipe: train a low-rank adapter instead of the weights themselves."""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from llama2rt.model import LlamaConfig
from llama2rt.model.adapters import adapt, require_peft
from llama2rt.run.recipe import check_integers
from llama2rt.train.options import TrainOptions

Target = Literal["query", "key", "value", "attention_output", "gate", "up", "down"]


class LoraOptions(BaseModel):
    """Low-rank adapters (LoRA, Hu et al. 2021) in place of training all weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int | None = Field(default=None, gt=0)
    """of each adapter; None to train all weights. Needs peft: pip install 'llama2rt[lora]'"""
    alpha: float | None = Field(default=None, gt=0)
    """an adapter's output is scaled by alpha / rank; None for twice the rank"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """probability that training drops an input of an adapter"""
    targets: list[Target] = Field(
        default=["query", "key", "value", "attention_output", "gate", "up", "down"], min_length=1
    )
    """the linear layers of each block that get one (all: Dettmers et al. 2023, section 4)"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_integers(self)
        if self.rank is None and (self.alpha is not None or self.dropout):
            raise ValueError("rank: missing; without it all weights are trained")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets: expected different layers, got {self.targets}")
        return self

    def check(self) -> None:
        """InputError where an adapter is asked for and peft is not installed."""
        if self.rank is not None:
            require_peft()

    def parameters(self, config: LlamaConfig, scalar: bool) -> int:
        """Weights of a model that are trained: those of its adapter, and a regression head."""
        if self.rank is None:
            raise ValueError("rank: None: everything is trained")
        dim, kv, hidden = config.dim, config.kv_heads * config.head_dim, config.ffn_hidden
        inputs_and_outputs = {
            "query": 2 * dim,
            "key": dim + kv,
            "value": dim + kv,
            "attention_output": 2 * dim,
            "gate": dim + hidden,
            "up": dim + hidden,
            "down": dim + hidden,
        }
        of_block = self.rank * sum(inputs_and_outputs[target] for target in self.targets)
        return config.layers * of_block + (dim if scalar else 0)

    def load_dtype(self, options: TrainOptions) -> torch.dtype:
        """In which dtype a stage loads what it trains: in fp32 for an optimizer's masters, in the
        compute dtype below an adapter, whose masters are its own."""
        return torch.float32 if self.rank is None else options.dtype

    def adapt(self, model: nn.Module, seed: int) -> None:
        """`model.adapters.adapt`, where the recipe asks for an adapter. Its dropout draws from
        torch's own generators, which `seed` starts then."""
        if self.rank is not None:
            adapt(
                model,
                rank=self.rank,
                alpha=self.alpha or 2.0 * self.rank,
                dropout=self.dropout,
                targets=self.targets,
                seed=seed,
            )
        if self.dropout:
            torch.manual_seed(seed)


class LoraWithoutDropout(LoraOptions):
    """Low-rank adapters (LoRA, Hu et al. 2021) in place of training all weights."""

    dropout: float = Field(default=0.0, ge=0, le=0)
    """none: the policy that is trained must be the one that has sampled"""
