"""The knobs of one optimisation run, as they stand under `[train]` in a recipe.

Defaults are LLaMA 2's pretraining values (section 2); a stage that differs overrides them beside
the section it follows.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llama2rt.errors import InputError
from llama2rt.run.recipe import check_integers

if TYPE_CHECKING:
    import torch


def _switched(given: Any) -> Any:
    return {True: "full", False: "none"}[given] if isinstance(given, bool) else given


# The validator belongs to the type, which plans take over without the class around it.
Recomputed = Annotated[Literal["none", "selective", "full"], BeforeValidator(_switched)]


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
    moments: Literal["fp32", "bf16"] = "fp32"
    """in what AdamW's two moments are kept; bf16 halves them, rounded so that averages are right"""
    optimizer_device: Literal["cpu"] | None = None
    """where masters, moments and gradient sums are held and steps are taken; None for the model's
    device. "cpu" leaves a GPU the weights and one micro-batch's gradients, for a slower step; where
    there is no GPU it changes nothing"""
    activation_checkpointing: Recomputed = "none"
    """what of a block's activations is computed again in the backward pass: nothing; all but what
    matrix products and attention gave; all but the block's inputs. true stands for full"""
    compile: bool = False
    """fuse each block's operations by torch.compile, which takes a minute before the first step"""
    micro_tokens: int = Field(default=4096, gt=0)
    """most tokens in one forward pass; a larger batch is accumulated over several"""

    outlier_sigmas: float = Field(default=0.0, ge=0)
    """skip a step whose loss or gradient norm is so many standard deviations above the mean of the
    last accepted ones; 0 to take every step, as the papers do (6 is usual)"""
    outlier_window: int = Field(default=128, gt=1)
    """accepted steps that a step is compared with; the first so many are all taken"""
    outlier_limit: int = Field(default=10, gt=0)
    """skipped steps in a row that end the run"""

    log_every: int = Field(default=1, gt=0)
    """steps between lines in metrics.jsonl"""
    checkpoint_every: int = Field(default=200, ge=0)
    """steps between checkpoints; 0 for none but the one that Ctrl-C leaves"""
    validate_every: int = Field(default=0, ge=0)
    """steps between held-out evaluations; 0 for one at the end only"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_integers(self)
        if self.compile and self.activation_checkpointing == "selective":
            # Inside a compiled block nobody can tell one operation's result from another's.
            raise ValueError("activation_checkpointing: selective excludes compile: take full")
        if self.warmup_steps and (self.warmup_ratio or self.warmup_minimum):
            raise ValueError(
                "warmup_steps excludes warmup_ratio and warmup_minimum: set one side to 0"
            )
        return self

    def check(self, ranks: int, device: str) -> None:
        """InputError where so many processes, each with a model on `device`, cannot train so."""
        if self.optimizer_device not in (None, device) and ranks > 1:
            raise InputError("train.optimizer_device: of a model that is sharded, leave it out")

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of activations and of the weights as the model sees them."""
        from llama2rt.train.precision import compute_dtype

        return compute_dtype(self.precision)
