"""The annotator as a recipe names it."""

import importlib
from collections.abc import Container
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt.annotate.files import FileAnnotator
from llama2rt.annotate.models import JudgeAnnotator, RewardAnnotator
from llama2rt.annotate.pairs import Annotator
from llama2rt.checkpoint import load
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.text.tokenizer import Tokenizer


class AnnotatorOptions(BaseModel):
    """Who compares: exactly one of files, helpfulness, judge and python."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[Path] = Field(default=[])
    """people's judgements of the pairs that the stage writes (see `annotate.files`); where they are
    still to be made, the stage stops with the pairs written, and goes on with --resume. With
    python: what its function reads"""
    helpfulness: Path | None = None
    """a reward model that is held to be right"""
    safety: Path | None = None
    """its companion for safety batches; None for helpfulness in these too"""
    judge: Path | None = None
    """a language model that is asked in both orders"""
    python: str | None = None
    """`package.module:function`, which is called with the paths in files and gives an
    `annotate.Annotator`"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        named = [key for key in ("helpfulness", "judge", "python") if getattr(self, key)]
        if (
            len(named) > 1
            or (not named and not self.files)
            or (self.files and self.python is None and named)
        ):
            raise ValueError("give one of files, helpfulness, judge and python (with its files)")
        if self.safety is not None and self.helpfulness is None:
            raise ValueError("safety: only beside helpfulness")
        if self.python is not None and ":" not in self.python:
            raise ValueError(f"python: expected package.module:function, got {self.python!r}")
        return self

    def check(self, to_come: Container[Path] = ()) -> None:
        """InputError for a model that could not be loaded, or a file of python that is not there,
        unless it is one `to_come`, and for a function that is not there."""
        models = {"helpfulness": ScalarModel, "safety": ScalarModel, "judge": Llama}
        for key, expected in models.items():
            if (folder := getattr(self, key)) is not None and folder not in to_come:
                _load(folder, expected, f"annotator.{key}", "meta")
        if self.python is not None:
            _function(self.python)
            for path in self.files:
                if path not in to_come and not path.exists():
                    raise InputError(f"annotator.files: {path}: no such file")

    def annotator(self, pairs_file: Path, device: str) -> Annotator:
        """Ready to compare; models in fp32 on `device`. `pairs_file` is what people judge from."""
        if self.python is not None:
            made: Annotator = _function(self.python)(*self.files)
            return made
        if self.judge is not None:
            return JudgeAnnotator(*_load(self.judge, Llama, "annotator.judge", device))
        if self.helpfulness is not None:
            models = {
                kind: _load(folder, ScalarModel, f"annotator.{kind}", device)
                for kind, folder in (("helpfulness", self.helpfulness), ("safety", self.safety))
                if folder is not None
            }
            return RewardAnnotator(models)
        return FileAnnotator(self.files, pairs_file)


def _load(folder: Path, expected: type, key: str, device: str) -> tuple[Any, Tokenizer]:
    model, tokenizer = load(folder, device)
    if not isinstance(model, expected):
        kinds = {ScalarModel: "reward", Llama: "language"}
        wanted, found = kinds[expected], kinds[type(model)]
        raise InputError(f"{key}: {folder}: expected a {wanted} model, found a {found} model")
    if tokenizer is None:
        raise InputError(f"{key}: {folder}: holds no tokenizer")
    return model.requires_grad_(False).eval(), tokenizer


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"annotator.python: {name}: {error}") from None
