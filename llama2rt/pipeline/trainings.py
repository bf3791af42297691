"""The trainings of a study: each model that it does not find trained, at each amount of data, from
each seed, as steps of a plan. A model's recipe is that of an earlier run, laid over by what the
study says of all its models, then by the model's own keys."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, SerializeAsAny, ValidationError, create_model, model_validator

from llama2rt.errors import InputError
from llama2rt.pipeline.iterate import merged
from llama2rt.pipeline.keys import NamedKeys, keys_of
from llama2rt.pipeline.plan import Step
from llama2rt.pipeline.scorers import BASELINES
from llama2rt.run import manifest
from llama2rt.run.unfinished import first_problem
from llama2rt.stages.reward import RewardRecipe

# Of a recipe's paths, those of files of records, which may be tables.
_SOURCES = ("data", "mixed_in", "sources", "validation")
_FOLDERS = ("init", "tokenizer")


class ModelKeys(NamedKeys):
    """A model of a study: the folder of one that is trained, or keys of the reward stage."""

    trained: Path | None = None
    """a reward model of this project"""
    classifier: Path | None = None
    """a folder of transformers' for sequence classification"""
    preference: Path | None = None
    """a pairwise preference model of this project"""
    judge: Path | None = None
    """a language model that is asked which of two answers is better"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.baseline and len(self.model_fields_set) > 2:
            others = sorted(self.model_fields_set - {"name", self.baseline})
            raise ValueError(
                f"{self.baseline}: is not trained, so {', '.join(others)} says nothing"
            )
        return self

    @property
    def baseline(self) -> str | None:
        """Which of the keys of what is not trained it has."""
        return next((key for key in BASELINES if getattr(self, key) is not None), None)

    def recipe_keys(self) -> dict[str, Any]:
        return {key: value for key, value in self.given().items() if key != "name"}


@functools.cache
def model_type() -> type[ModelKeys]:
    """What may stand in one of [[models]]."""
    return create_model("ModelKeys", __base__=ModelKeys, **keys_of(RewardRecipe))


AnyModel = Annotated[
    SerializeAsAny[ModelKeys],
    BeforeValidator(
        lambda given: model_type().model_validate(given) if isinstance(given, Mapping) else given
    ),
]
"""A model with the keys of the reward stage."""


class Training(NamedTuple):
    """One run of the reward stage."""

    model: str
    limit: int | None
    """comparisons, at most; None for all"""
    seed: int
    recipe: RewardRecipe

    @property
    def label(self) -> str:
        """What its model is called in tables, where the seeds of one are put together."""
        return self.model if self.limit is None else f"{self.model}, {self.limit} comparisons"

    @property
    def step(self) -> Step:
        limit = "" if self.limit is None else f"-{self.limit}"
        return Step(f"{self.model}{limit}-seed-{self.seed}", "reward", lambda outputs: self.recipe)


def trainings(
    models: Sequence[ModelKeys],
    below: Mapping[str, Any],
    limits: Sequence[int],
    seeds: Sequence[int],
) -> list[Training]:
    """Of the models that are not there yet, in order. `below`: keys under the models' own.
    InputError naming the model whose recipe is wrong."""
    found = []
    for model in models:
        if model.baseline:
            continue
        keys = model.recipe_keys()
        for key, why in (("seed", "seeds"), ("data_limit", "data_limits")):
            if key in keys:
                raise InputError(f"models: {model.name}: {key}: {why} of the study says it")
        base = dict(below)
        if "model" in keys and "init" not in keys and "init" in base:
            # A shape of its own begins from random weights, with the tokenizer that the rest has.
            base.setdefault("tokenizer", base["init"])
            del base["init"]
        amounts: Sequence[int | None] = limits or [None]
        for limit in amounts:
            for seed in seeds:
                given = merged(base, keys) | {"seed": seed}
                if limit is not None:
                    given["data_limit"] = limit
                try:
                    recipe = RewardRecipe.model_validate(given)
                except ValidationError as error:
                    problem = first_problem(error.errors(), RewardRecipe)
                    raise InputError(f"models: {model.name}: {problem}") from None
                found.append(Training(model.name, limit, seed, recipe))
    return found


def recipe_of(directory: Path) -> dict[str, Any]:
    """The keys of the recipe of a run of the reward stage, its paths absolute. InputError where the
    directory holds none. What the run replaced (`previous`) and how much it left out are its own.
    """
    path = directory / manifest.FILE
    if not path.is_file():
        raise InputError(f"like: {directory}: no run directory (no {manifest.FILE})")
    found = manifest.read(path)
    try:
        recipe = RewardRecipe.model_validate(found["recipe"])
    except ValidationError:
        raise InputError(f"like: {directory}: not a run of the reward stage") from None
    keys = recipe.model_dump(mode="json", exclude_none=True, exclude={"previous", "data_limit"})
    where = Path(found.get("working_directory", "."))
    for key in _FOLDERS:
        if key in keys:
            keys[key] = str(where / keys[key])
    for key in _SOURCES:
        if key in keys:
            keys[key] = [_below(where, source) for source in keys[key]]
    return keys


def _below(where: Path, source: Any) -> Any:
    if isinstance(source, dict):
        return source | {"path": str(where / source["path"])}
    return str(where / source)
