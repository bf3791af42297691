"""The annotator as a recipe names it."""

import importlib
import os
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt.annotate.files import FileAnnotator
from llama2rt.annotate.models import JudgeAnnotator, PreferenceAnnotator, RewardAnnotator
from llama2rt.annotate.pairs import Annotator
from llama2rt.checkpoint import load
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.text.tokenizer import Tokenizer


class AnnotatorOptions(BaseModel):
    """Who compares: exactly one of files, helpfulness, preference, judge and python."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[Path] = Field(default=[])
    """people's judgements of the pairs that the stage writes (see `annotate.files`); where they are
    still to be made, the stage stops with the pairs written, and goes on with --resume. With
    python: what its function reads"""
    helpfulness: Path | None = None
    """a reward model that is held to be right"""
    safety: Path | None = None
    """its companion for safety batches; None for helpfulness in these too"""
    preference: Path | None = None
    """a pairwise preference model (the stage preference), asked in both orders"""
    judge: Path | None = None
    """a language model that is asked in both orders"""
    python: str | None = None
    """`package.module:function`, which is called with the paths in files and gives an
    `annotate.Annotator`"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        named = [
            key for key in ("helpfulness", "preference", "judge", "python") if getattr(self, key)
        ]
        if (
            len(named) > 1
            or (not named and not self.files)
            or (self.files and self.python is None and named)
        ):
            raise ValueError(
                "give one of files, helpfulness, judge and python (with its files), or preference"
            )
        if self.safety is not None and self.helpfulness is None:
            raise ValueError("safety: only beside helpfulness")
        if self.python is not None and ":" not in self.python:
            raise ValueError(f"python: expected package.module:function, got {self.python!r}")
        return self

    def check(
        self,
        models: Mapping[Path, Any] | None = None,
        files: Container[Path] = (),
        longest: int = 0,
    ) -> None:
        """InputError for a model that could not be loaded or could not read an answer that is, with
        its prompt, `longest` tokens long, for a file of `python` that is not there, and for a
        function that is not there. What earlier steps of a plan will leave: outlines (with `config`
        and `scalar`) of `models` by folder, and `files`."""
        for key in ("helpfulness", "safety", "preference", "judge"):
            if (folder := getattr(self, key)) is None:
                continue
            reads_both = key in ("preference", "judge")
            expected: type[ScalarModel] | type[Llama] = Llama if reads_both else ScalarModel
            if models is not None and folder in models:
                config, scalar = models[folder].config, models[folder].scalar
                _require_kind(folder, scalar == (expected is ScalarModel), expected, key)
            else:
                config = _load(folder, expected, key, "meta")[0].config
            if config.context < longest:
                raise InputError(
                    f"annotator.{key}: {folder}: its context of {config.context} tokens is shorter "
                    f"than the longest prompt with its answer, {longest}"
                )
        if self.python is not None:
            named_function(self.python, "annotator.python")
            for path in self.files:
                if path not in files and not path.exists():
                    raise InputError(f"annotator.files: {path}: no such file")

    def annotator(self, pairs_file: Path, device: str) -> Annotator:
        """Ready to compare; models in fp32 on `device`. `pairs_file` is what people judge from."""
        if self.python is not None:
            made: Annotator = named_function(self.python, "annotator.python")(*self.files)
            return made
        if self.judge is not None:
            return JudgeAnnotator(*_load(self.judge, Llama, "judge", device))
        if self.preference is not None:
            loaded = _load(self.preference, Llama, "preference", device)
            return PreferenceAnnotator(PairwiseModel(*loaded))
        if self.helpfulness is not None:
            models = {
                kind: _load(folder, ScalarModel, kind, device)
                for kind, folder in (("helpfulness", self.helpfulness), ("safety", self.safety))
                if folder is not None
            }
            return RewardAnnotator(models)
        return FileAnnotator(self.files, pairs_file)


def _load(
    folder: Path, expected: type[ScalarModel] | type[Llama], key: str, device: str
) -> tuple[Any, Tokenizer]:
    model, tokenizer = load(folder, device)
    _require_kind(folder, isinstance(model, expected), expected, key)
    if tokenizer is None:
        raise InputError(f"annotator.{key}: {folder}: holds no tokenizer")
    return model.requires_grad_(False).eval(), tokenizer


def _require_kind(
    folder: Path, fits: bool, expected: type[ScalarModel] | type[Llama], key: str
) -> None:
    if not fits:
        names = "reward", "language"
        wanted, found = names if expected is ScalarModel else reversed(names)
        raise InputError(
            f"annotator.{key}: {folder}: expected a {wanted} model, found a {found} model"
        )


def named_function(name: str, key: str) -> Any:
    """What a recipe's `key` names as package.module:function; InputError where it is not there."""
    module, _, function = name.partition(":")
    # As python -m would find it; last, so that nothing there hides an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{key}: {name}: {error}") from None
