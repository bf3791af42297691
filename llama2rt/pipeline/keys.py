"""Recipes in part: what a plan says of a stage before the rest is known.

The keys are those of the stage's own recipe, checked one by one as they are read; what is left out
comes from the plan or from the stage's defaults, and what must agree with each other is checked
when the recipe is whole.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    create_model,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo

from llama2rt.run import whole_type
from llama2rt.stages import STAGES

# What lies in the plan's own run directory beside its steps.
_TAKEN = (
    "recipe.toml",
    "manifest.json",
    "metrics.jsonl",
    "phases.json",
    "report.html",
    "report.json",
    "checkpoints",
    "model",
    "samples",
    "scores",
    "tables.md",
)


class StageKeys(BaseModel):
    """Some keys of a stage's recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_serializer(mode="plain")
    def given(self) -> dict[str, Any]:
        """The keys that were given, as JSON; of tables likewise only these, since a stage has other
        defaults for them."""
        return {key: _plain(getattr(self, key)) for key in sorted(self.model_fields_set)}

    def recipe_keys(self) -> dict[str, Any]:
        """Those of the stage's recipe."""
        return self.given()


class NamedKeys(StageKeys):
    """Keys under a name that a folder can have."""

    name: str
    """such as RLHF-V1; also the folder's name"""

    @field_validator("name")
    @classmethod
    def _is_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w .,+=()-]*", name) or name in _TAKEN:
            raise ValueError(
                "expected the name of a folder of its own, beginning with a letter or digit, of "
                f"these and spaces and .,+=()-_, got {name!r}"
            )
        return name


class PlanStep(NamedKeys):
    """A step as a file describes it."""

    stage: str
    """what it runs"""

    def recipe_keys(self) -> dict[str, Any]:
        return {key: value for key, value in self.given().items() if key not in ("name", "stage")}


@functools.cache
def keys_of(table: type[BaseModel]) -> dict[str, Any]:
    """The fields of a recipe or of one of its tables, each of which may be absent."""
    return {name: (_in_part(field) | None, None) for name, field in table.model_fields.items()}


def _in_part(field: FieldInfo) -> Any:
    """The type of a field; of a table, one of whose keys too each may be absent."""
    table = field.annotation
    if isinstance(table, type) and issubclass(table, BaseModel):
        return create_model(f"{table.__name__}Keys", __base__=StageKeys, **keys_of(table))
    return whole_type(field)


@functools.cache
def table_type(stage: str) -> type[StageKeys]:
    """What may stand in a table of a stage's keys."""
    keys = keys_of(STAGES[stage].recipe)
    return create_model(f"{stage.title()}Keys", __base__=StageKeys, **keys)


@functools.cache
def step_type(stage: str) -> type[PlanStep]:
    """What may stand in a step of a stage."""
    keys = keys_of(STAGES[stage].recipe)
    return create_model(f"{stage.title()}Step", __base__=PlanStep, **keys)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _step(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    return step_type(_known(given.get("stage"))).model_validate(given)


def _tables(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    if all(isinstance(keys, StageKeys) for keys in given.values()):
        return given
    # As one model, so that what is wrong is named with its stage.
    fields: dict[str, Any] = {stage: (table_type(_known(stage)), ...) for stage in given}
    tables = create_model("Tables", **fields).model_validate(given)
    return {stage: getattr(tables, stage) for stage in given}


def _known(stage: Any) -> str:
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"{stage!r} is no stage: expected one of {', '.join(STAGES)}")
    return str(stage)


AnyStep = Annotated[SerializeAsAny[PlanStep], BeforeValidator(_step)]
"""A step with the keys of its stage."""
Tables = Annotated[dict[str, SerializeAsAny[StageKeys]], BeforeValidator(_tables)]
"""Keys by stage."""
