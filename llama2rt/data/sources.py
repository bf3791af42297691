"""A file of records, with what a recipe says about it.

Public files seldom say what they are: Anthropic's harmlessness pairs have no kind, and a mixture
names no origin. Wherever a path to records is expected, a `Source` is accepted too.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from llama2rt.data.formats import named
from llama2rt.errors import InputError

# The kinds of record that each key applies to.
_APPLIES_TO = {
    "kind": ("prompt", "comparison", "sample"),
    "source": ("document", "dialogue", "comparison"),
    "minimum_score_difference": ("comparison",),
    "consensus": ("comparison",),
    "held_out": ("comparison",),
}


class Source(BaseModel):
    """A path, or a table `{path = "hh.jsonl.gz", kind = "safety"}` in a recipe; an option takes
    the same text. Written back, it is a path where the table says nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Path
    """the file, or the folder of a saved dataset"""
    format: str | None = None
    """of its rows, where two could be meant ("anthropic-hh-transcripts"; "llama2rt" is our own);
    None to recognise each row by its keys"""
    kind: Literal["helpfulness", "safety"] | None = None
    """of comparisons, prompts and samples that do not say their kind; those that say another are
    left out"""
    source: str | None = None
    """name of the origin, for records that do not give one"""
    minimum_score_difference: float = Field(default=0.0, ge=0)
    """pairs of answers whose scores differ by less are left out, in the scale of the file's scores
    (UltraFeedback 1 to 5, HelpSteer helpfulness plus correctness 0 to 8; arXiv 2405.07863, section
    2, leaves out pairs whose scores differ little and names no number)"""
    consensus: bool = False
    """pairs that several raters judged are one comparison each, as the majority of their votes has
    it (section 4.4 of Llama 2); those without a majority are left out. The file's records are held
    in memory for it"""
    held_out: int | None = Field(default=None, ge=0)
    """in a reward recipe's data: how many comparisons of this source to keep back; None for the
    recipe's held_out"""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str | os.PathLike) else given

    @model_serializer(mode="wrap")
    def _as_given(self, handler: Any, info: Any) -> Any:
        said = {name: value for name, value in handler(self).items() if name in self._said()}
        return said["path"] if len(said) == 1 else said

    def _said(self) -> set[str]:
        fields = type(self).model_fields
        return {"path"} | {
            n for n in fields if n != "path" and getattr(self, n) != fields[n].default
        }

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return os.fspath(self.path)

    def require_meaning(self, kind: str) -> None:
        """InputError for a key that does not apply to records of `kind`, and for a format that
        gives no such records."""
        for key, kinds in _APPLIES_TO.items():
            if key in self._said() and kind not in kinds:
                raise InputError(f"{self.path}: {key}: means nothing to a file of {kind}s")
        if self.format is not None:
            try:
                named(self.format, kind)
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from None

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "Source":
        """`path` itself where it is a Source, else a Source that says nothing but the path."""
        return path if isinstance(path, Source) else cls(path=Path(path))

    def in_format(self, format: str | None) -> "Source":
        """The same with `format` where it names none itself."""
        if format is None or self.format is not None:
            return self
        return self.model_copy(update={"format": format})

    def as_option(self) -> str:
        """What `parse` reads back."""
        said = self.model_dump(mode="json")
        if isinstance(said, str):
            return said
        # JSON's texts and numbers are TOML's, but for escaped surrogates and a bare DEL.
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in said.items()}
        pairs = (f"{key} = {text}".replace("\x7f", "\\u007f") for key, text in texts.items())
        return "{" + ", ".join(pairs) + "}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From an option: a path, or an inline table of TOML. InputError for a table that is
        none."""
        if not text.lstrip().startswith("{"):
            return cls(path=Path(text))
        try:
            return cls.model_validate(tomllib.loads(f"source = {text}")["source"])
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{text}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"{text}: {key}: {first['msg']}") from None


class MixSource(Source):
    """A source of a mix (`[[sources]]` in a recipe), and how much of it goes in: all of it, unless
    it has a share."""

    share: float | None = Field(default=None, gt=0, le=1)
    """of the training set: so many of its records are drawn, uniformly and without replacement, as
    make up this share of it"""
    pool: str | None = None
    """sources of one pool are drawn from as if they were one file; all give the pool's share"""


class WeightedSource(Source):
    """A source of pretraining text (`[[sources]]` in its recipe): documents, or the folder of token
    shards that `llama2rt corpus` leaves."""

    weight: float | None = Field(default=None, gt=0)
    """of the tokens that are read of it, beside the other sources' weights, in any scale (section
    2.1 up-samples the most factual sources); on no source, each gives as much as it holds"""
    most_repeats: float | None = Field(default=None, gt=0)
    """times that a run may go through it; None for any number. A run that would go through it more
    often is refused before it begins"""
