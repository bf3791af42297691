"""Instructions that are to hold for a whole dialogue, and whether an answer follows one.

Llama 2's Ghost Attention (section 3.3, appendix A.3.5) combines a few constraints at random (a
hobby, a language, a public figure) and makes half of its system messages terse. Constraints come
from a TOML file, or from `data/instructions.toml`. Whether an answer follows is said by a rule that
stands beside each in the file: no model is asked.
"""

import re
import tomllib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llama2rt.errors import InputError

SHIPPED = Path(__file__).with_name("instructions.toml")
VALUE = "{value}"
"""stands for an attribute's value in its texts and its check"""


class Check(BaseModel):
    """What an answer that follows must look like; all that is given must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contains: list[str] = []
    """texts that all stand in it, in any case"""
    lacks: list[str] = []
    """texts of which none does"""
    regex: str | None = None
    """a Python regular expression that is found in it; a value is put into it as plain text"""
    scripts: list[str] = []
    """at least half of its letters are of these, by the first word of their Unicode names (LATIN,
    CYRILLIC, HIRAGANA, CJK ...)"""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile((pattern or "").replace(VALUE, "value"))
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    @field_validator("scripts")
    @classmethod
    def _as_unicode(cls, scripts: list[str]) -> list[str]:
        if wrong := [script for script in scripts if script != script.upper() or not script]:
            raise ValueError(f"expected names in capitals as LATIN, got {wrong[0]!r}")
        return scripts

    @field_validator("contains", "lacks")
    @classmethod
    def _no_blanks(cls, texts: list[str]) -> list[str]:
        if not all(text.strip() for text in texts):
            raise ValueError("a blank text stands in every answer")
        return texts

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.contains or self.lacks or self.regex or self.scripts):
            raise ValueError("give at least one of contains, lacks, regex, scripts")
        return self

    def passes(self, answer: str, value: str) -> bool:
        """Whether `answer` follows an attribute of this value."""
        folded = answer.casefold()
        if not all(text.replace(VALUE, value).casefold() in folded for text in self.contains):
            return False
        if any(text.replace(VALUE, value).casefold() in folded for text in self.lacks):
            return False
        pattern = (self.regex or "").replace(VALUE, re.escape(value))
        if not re.search(pattern, answer):
            return False
        return not self.scripts or _share_of_letters(answer, self.scripts) >= 0.5


def _share_of_letters(text: str, scripts: Sequence[str]) -> float:
    letters = [unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha()]
    return sum(name in scripts for name in letters) / len(letters) if letters else 0.0


class Value(BaseModel):
    """One that an attribute may have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: str = Field(min_length=1)
    check: Check | None = None
    """in place of the attribute's"""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"value": given} if isinstance(given, str) else given


class Attribute(BaseModel):
    """A constraint that can have several values, and its wordings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    full: str
    """the instruction in a sentence, with {value} in it"""
    terse: str
    """the same in a word or two"""
    values: list[Value] = Field(min_length=1)
    check: Check | None = None
    """None where no rule can say whether an answer follows: it is not measured"""

    @field_validator("full", "terse")
    @classmethod
    def _names_the_value(cls, text: str) -> str:
        if VALUE not in text:
            raise ValueError(f"expected a text with {VALUE} in it, got {text!r}")
        return text


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    attributes: list[Attribute] = Field(min_length=1)


@dataclass(frozen=True)
class Chosen:
    """One attribute of an instruction, with its value."""

    attribute: Attribute
    value: Value

    @property
    def check(self) -> Check | None:
        return self.value.check or self.attribute.check

    def follows(self, answer: str) -> bool | None:
        """Whether `answer` does; None where no rule can say."""
        return None if self.check is None else self.check.passes(answer, self.value.value)


@dataclass(frozen=True)
class Instruction:
    """Some attributes together, in the order in which they are said."""

    chosen: tuple[Chosen, ...]
    terse: bool
    """how it is said as a system message; beside the user's messages it is said in full"""

    @property
    def full_text(self) -> str:
        return " ".join(c.attribute.full.replace(VALUE, c.value.value) for c in self.chosen)

    @property
    def text(self) -> str:
        """In full or tersely, as `terse` says."""
        if not self.terse:
            return self.full_text
        return " ".join(c.attribute.terse.replace(VALUE, c.value.value) for c in self.chosen)

    def follows(self, answer: str) -> dict[str, bool]:
        """By name of each attribute that a rule can check: whether `answer` follows it. Beside one
        that asks for other letters than Latin only that one can: the rules of the others look for
        words that are written in them."""
        foreign = [c for c in self.chosen if c.check and {*c.check.scripts} - {"LATIN"}]
        verdicts = ((c.attribute.name, c.follows(answer)) for c in foreign or self.chosen)
        return {name: verdict for name, verdict in verdicts if verdict is not None}

    def to_json(self) -> dict[str, Any]:
        values = {c.attribute.name: c.value.value for c in self.chosen}
        return {"instruction": self.text, "attributes": values}


def read(path: Path | None = None) -> list[Attribute]:
    """The attributes of a TOML file ([[attributes]] tables), None for those that are shipped.
    InputError naming the file and the key for anything else."""
    path = path or SHIPPED
    try:
        found = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    names = [attribute.name for attribute in found.attributes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: two attributes are called {min(twice)!r}")
    return found.attributes


def draw(
    attributes: Sequence[Attribute], count: int, seed: int, *, terse: float = 0.5
) -> list[Instruction]:
    """`count` instructions: each has some of the attributes, any number being as likely as another,
    in any order, each with any of its values, and is terse with that probability (appendix A.3.5:
    half of the time). The first ones do not depend on `count`."""
    found = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        several = rng.permutation(len(attributes))[: rng.integers(1, len(attributes) + 1)]
        chosen = tuple(
            Chosen(attributes[i], attributes[i].values[rng.integers(len(attributes[i].values))])
            for i in several
        )
        found.append(Instruction(chosen, bool(rng.random() < terse)))
    return found
