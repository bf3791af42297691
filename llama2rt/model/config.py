"""The shape of a model, the published presets, and how many parameters a shape has."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA-2-family transformer; raises ValueError for a shape that cannot exist."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_hidden: int
    vocab_size: int = 32000
    context: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False  # one weight serves as embedding and output

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "kv_heads", "ffn_hidden", "vocab_size", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied: expected true or false, got {self.tied!r}")
        if self.dim % self.heads:
            raise ValueError(f"heads: expected a divisor of dim {self.dim}, got {self.heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"heads: rotary pairs need an even head dimension, got {self.head_dim} "
                f"(dim {self.dim} / heads {self.heads})"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def parameters(self) -> int:
        """Number of trainable parameters of `Llama(self)`."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_heads * self.head_dim
        block = attention + 3 * self.dim * self.ffn_hidden + 2 * self.dim
        vocabulary = self.vocab_size * self.dim * (1 if self.tied else 2)
        return self.layers * block + vocabulary + self.dim

    @staticmethod
    def presets() -> list[str]:
        """Names that `preset` takes."""
        return list(PRESETS)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "LlamaConfig":
        """A published shape by name, with fields replaced as asked; ValueError if unknown."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)


# LLaMA (Touvron et al. 2023a, Table 2), Llama 2 (Touvron et al. 2023b, Table 1 and appendix A.2.1)
# with the released params.json; the 34B shape was released only as Code Llama (theta 1e6, context
# 16384), here with Llama 2's own context. Llama 3 8B (Dubey et al. 2024, Table 3) is the model of
# the RLHF Workflow paper.
PRESETS = {
    "llama1-7b": LlamaConfig(4096, 32, 32, 32, 11008, context=2048, norm_eps=1e-6),
    "llama1-13b": LlamaConfig(5120, 40, 40, 40, 13824, context=2048, norm_eps=1e-6),
    "llama1-33b": LlamaConfig(6656, 60, 52, 52, 17920, context=2048, norm_eps=1e-6),
    "llama1-65b": LlamaConfig(8192, 80, 64, 64, 22016, context=2048),
    "llama2-7b": LlamaConfig(4096, 32, 32, 32, 11008),
    "llama2-13b": LlamaConfig(5120, 40, 40, 40, 13824),
    "llama2-34b": LlamaConfig(8192, 48, 64, 8, 22016),
    "llama2-70b": LlamaConfig(8192, 80, 64, 8, 28672),
    "llama3-8b": LlamaConfig(
        4096, 32, 32, 8, 14336, vocab_size=128256, context=8192, rope_theta=5e5
    ),
}
