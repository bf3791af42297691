"""What a campaign of annotation is: who answers, what is asked, and of whom how often."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llama2rt.data.sources import Source
from llama2rt.errors import InputError

Kind = Literal["helpfulness", "safety"]
_WHERE_FROM = ("model", "server", "samples", "dialogues")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Variant(_Table):
    """Who answers: exactly one of model, server, samples and dialogues."""

    name: str = Field(min_length=1, max_length=100)
    """as results name it; annotators never see it"""
    model: Path | None = None
    """folder of a model, or a GGUF file, that answers in this process"""
    server: str | None = None
    """URL of a server of OpenAI's API, its key in LLAMA2RT_API_KEY"""
    server_model: str | None = None
    """the model's name at the server; None for the first that it lists"""
    samples: list[Path] = Field(default=[])
    """files of samples, the first one of each prompt"""
    dialogues: list[Source] = Field(default=[])
    """files of dialogues, whose last answers people wrote (SFT data)"""
    temperature: float = Field(default=1.0, ge=0)
    """of model and server; section 3.2.1 varies it between the two responses"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """likewise"""
    max_tokens: int = Field(default=512, gt=0)
    """longest response; a pair with one that is cut there is sampled again, then given up"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(bool(getattr(self, key)) for key in _WHERE_FROM) != 1:
            raise ValueError(f"variant {self.name!r}: give one of {', '.join(_WHERE_FROM)}")
        if self.server_model is not None and self.server is None:
            raise ValueError("server_model: only with server")
        return self

    @property
    def samples_now(self) -> bool:
        """Whether it can answer any prompt."""
        return self.model is not None or self.server is not None


class Config(_Table):
    """A page of one folder, on which people compare."""

    store: Path
    """folder of the judgements; a server that is started again goes on with what is there"""
    mode: Literal["preference", "evaluation"] = "preference"
    """preference: a choice, the 4-point rating and in safety batches the safety label (section
    3.2.1); evaluation: the 7-point scale (appendix A.3.7)"""
    variants: list[Variant] = Field(default=[])
    """who answers. preference: two of them, drawn for each prompt; evaluation: the first against
    each of the others"""
    prompts: list[Source] = Field(default=[])
    """what is asked; none, and no pairs: what the variants' dialogues and samples were asked"""
    pairs: list[Path] = Field(default=[])
    """files of pairs that the stage annotate has written (pairs.jsonl)"""
    draw: int | None = Field(default=None, gt=0)
    """how many of prompts, drawn by seed; None for all. Section 3.1 checked 180"""
    write: bool = False
    """whether annotators may write prompts of their own"""
    kinds: list[Kind] = Field(default=["helpfulness"], min_length=1)
    """what they may write prompts for"""
    turns: int = Field(default=1, ge=1, le=100)
    """most turns of a conversation, which goes on with the chosen response"""
    guidelines: dict[Kind, Path] = Field(default={})
    """a file of text or Markdown for each kind of batch"""
    raters: int = Field(default=1, ge=1, le=100)
    """how many annotators judge each pair; appendix A.3.7 has three"""
    ahead: int = Field(default=8, ge=1)
    """pairs sampled before somebody asks for them"""
    lease_minutes: int = Field(default=60, ge=1)
    """after so long a pair that was shown and not judged is shown to others too"""
    body_bytes: int = Field(default=256 * 1024, ge=1024)
    """largest body of a post"""
    public_url: str | None = None
    """address under which a proxy with TLS serves the page to other machines; None for none"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """of what is drawn, of the order of responses and of sampling"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("variants: two have the same name")
        if len(names) == 1:
            raise ValueError("variants: one response is compared with another; give two")
        if self.mode == "evaluation" and (self.write or self.turns > 1 or self.pairs):
            raise ValueError("mode: evaluation compares variants: no pairs, write or turns")
        if not self.pairs and not self.variants:
            raise ValueError("variants: expected two, or pairs that are there already")
        sampling = all(variant.samples_now for variant in self.variants) and self.variants
        for key, asked in (("write", self.write), ("turns", self.turns > 1)):
            if asked and not sampling:
                raise ValueError(f"{key}: needs variants that answer: each a model or a server")
        if self.prompts and not self.variants:
            raise ValueError("prompts: no variants answer them")
        url = urlsplit(self.public_url or "https://example.org")
        if url.scheme != "https" or not url.netloc or url.path.strip("/") or url.query:
            raise ValueError("public_url: expected https://NAME, which a proxy with TLS answers")
        return self


def read(path: Path) -> Config:
    """The configuration in a TOML file; InputError with the file and the line or key."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return Config.model_validate(values)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_said(error)}") from None


def _said(error: ValidationError) -> str:
    """The key and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such key"
    return f"{key}: {message}" if key else message


def guidelines(config: Config) -> dict[str, str]:
    """The text of each guideline; InputError for one that cannot be read."""
    found = {}
    for kind, path in config.guidelines.items():
        try:
            found[str(kind)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"guidelines.{kind}: {path}: {error}") from None
    return found
