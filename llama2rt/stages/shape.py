"""The table `[model]`: the shape of a model that starts from random weights."""

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from llama2rt.errors import InputError
from llama2rt.model import LlamaConfig
from llama2rt.run import check_integers


class ModelShape(BaseModel):
    """A published shape by name, or one's own; the vocabulary comes from the tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = None
    """such as llama2-7b; fields given beside it replace its own"""
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    """None for as many as heads (section 2.2: 8 in 34B and 70B)"""
    ffn_hidden: int | None = None
    """None for LLaMA's rule: 8/3 dim, rounded up to a multiple of 32"""
    context: int | None = None
    """longest sequence the model admits; None for the recipe's context"""
    norm_eps: float | None = None
    rope_theta: float | None = None
    tied: bool | None = None

    @model_validator(mode="after")
    def _integers(self) -> Self:
        check_integers(self)
        return self

    def config(self, vocab_size: int, context: int) -> LlamaConfig:
        """InputError for a shape that cannot exist."""
        given = self.model_dump(exclude={"preset"}, exclude_none=True)
        given = {"context": context, **given, "vocab_size": vocab_size}
        try:
            if self.preset is not None:
                return LlamaConfig.preset(self.preset, **given)
            missing = [name for name in ("dim", "layers", "heads") if name not in given]
            if missing:
                raise ValueError(f"give preset, or {', '.join(missing)} too")
            given.setdefault("kv_heads", given["heads"])
            given.setdefault("ffn_hidden", -(-8 * given["dim"] // 3 // 32) * 32)
            return LlamaConfig(**given)
        except ValueError as error:
            raise InputError(f"model: {error}") from None
