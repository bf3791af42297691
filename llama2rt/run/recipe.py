"""The base of every stage's recipe, and which of its changes a begun run may be resumed with."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

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


def whole_type(field: FieldInfo) -> Any:
    """The type of a recipe's field with its bounds and its own validators, which pydantic keeps
    apart from it."""
    if not field.metadata:
        return field.annotation
    return Annotated[(field.annotation, *field.metadata)]


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
        "train.optimizer_device",
        "train.activation_checkpointing",
    )
    """keys that say what is recorded and when, or where and how often the same is computed; not
    `train.compile`, under which an adapter's dropout draws other numbers"""
    durations: ClassVar[tuple[str, ...]] = ()
    """keys that say how long to train"""

    @classmethod
    def is_neutral(cls, key: str) -> bool:
        """Whether a key's value changes no weight but by rounding: on how many processes a run goes
        on is such a one."""
        return key in cls.neutral or key.startswith("parallel.")

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """What it means to a run that began with the recipe `begun` (its values by dotted key) to
        go on with this recipe, whose `key` has another value.

        More steps are the same course where no step's learning rate depends on how many follow.
        """
        if self.is_neutral(key):
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
