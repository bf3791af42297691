"""The knobs of one optimisation run, as they stand under `[train]` in a recipe.

Defaults are LLaMA 2's pretraining values (section 2); a stage that differs overrides them beside
the section it follows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import torch

Change = Literal["refused", "neutral", "longer"]
"""What another value of a key means to a run that has begun: another result, the same one, or the
same course followed further."""

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def check_integers(options: BaseModel) -> None:
    """ValueError naming a whole number that is too large: tokens, sequences and steps are counted
    in 32 bits; bytes, and what generators are seeded with, in 64."""
    for name in type(options).model_fields:
        value = getattr(options, name)
        most = _INT64_MAX if name == "seed" or name.endswith("_bytes") else _INT32_MAX
        if isinstance(value, int) and value > most:
            raise ValueError(f"{name}: expected at most {most}, got {value}")


class TrainOptions(BaseModel):
    """How to take optimizer steps: learning rate, AdamW, precision, memory, and what to record."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: float = Field(default=3e-4, gt=0)
    """peak learning rate (section 2: 3e-4 for 7B and 13B)"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: cosine down to min_lr_ratio, or constant (PPO, section 3.2.3)"""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """final learning rate as a fraction of the peak (section 2: 10 %)"""
    warmup_steps: int = Field(default=0, ge=0)
    """linear warm-up, in steps (section 2: 2000)"""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """linear warm-up as a fraction of all steps (section 3.2.2: 0.03); not with warmup_steps"""
    warmup_minimum: int = Field(default=0, ge=0)
    """fewest steps that warmup_ratio may come to (section 3.2.2: 5)"""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """on matrices only; norm weights are left alone"""
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    """largest global gradient norm (section 2: 1.0); inf for none"""

    precision: Literal["fp32", "bf16"] = "fp32"
    """compute precision; bf16 keeps fp32 master weights, moments and gradient sums"""
    activation_checkpointing: bool = False
    """keep one activation per block and recompute the rest in the backward pass"""
    micro_tokens: int = Field(default=4096, gt=0)
    """most tokens in one forward pass; a larger batch is accumulated over several"""

    log_every: int = Field(default=1, gt=0)
    """steps between lines in metrics.jsonl"""
    checkpoint_every: int = Field(default=200, ge=0)
    """steps between checkpoints; 0 for none but the one that Ctrl-C leaves"""
    validate_every: int = Field(default=0, ge=0)
    """steps between held-out evaluations; 0 for one at the end only"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_integers(self)
        if self.warmup_steps and (self.warmup_ratio or self.warmup_minimum):
            raise ValueError(
                "warmup_steps excludes warmup_ratio and warmup_minimum: set one side to 0"
            )
        return self

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of activations and of the weights as the model sees them."""
        from llama2rt.train.precision import compute_dtype

        return compute_dtype(self.precision)


class Recipe(BaseModel):
    """Base of the stages' recipes: no unknown keys, and tables that refine a stage's defaults.

    With `train: TrainOptions = TrainOptions(lr=2e-5)` in a stage, a file that says only
    `[train] clip = 0.5` keeps the stage's lr; plain pydantic would fall back to TrainOptions'.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    neutral: ClassVar[tuple[str, ...]] = (
        "train.log_every",
        "train.checkpoint_every",
        "train.validate_every",
    )
    """keys that say what is recorded and when, and change no weight"""
    durations: ClassVar[tuple[str, ...]] = ()
    """keys that say how long to train"""

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """What it means to a run that began with the recipe `begun` (its values by dotted key) to
        go on with this recipe, whose `key` has another value.

        More steps are the same course where no step's learning rate depends on how many follow.
        """
        if key in self.neutral:
            return "neutral"
        before, now = begun.get(key), getattr(self, key, None)
        train = getattr(self, "train", None)
        if (
            key in self.durations
            and isinstance(before, int | float)
            and isinstance(now, int | float)
            and now > before
            and train is not None
            and train.schedule == "constant"
            and not train.warmup_ratio
        ):
            return "longer"
        return "refused"

    @model_validator(mode="after")
    def _integers(self) -> Self:
        check_integers(self)
        return self

    @classmethod
    def refine(cls, given: dict[str, Any]) -> dict[str, Any]:
        """`given` with each table laid over the stage's default for it."""
        refined = dict(given)
        for name, field in cls.model_fields.items():
            if isinstance(refined.get(name), dict) and isinstance(field.default, BaseModel):
                refined[name] = field.default.model_dump(exclude_unset=True) | refined[name]
        return refined

    @model_validator(mode="before")
    @classmethod
    def _refined(cls, given: Any) -> Any:
        return cls.refine(given) if isinstance(given, dict) else given
