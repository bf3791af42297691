"""What a corpus is made of, and by which rules."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llama2rt.corpus.language import LANGUAGES
from llama2rt.corpus.quality import RULES
from llama2rt.data.sources import Source
from llama2rt.run import Recipe

Rule = Literal["gopher", "gopher_repetition", "c4"]
Form = Literal["NFC", "NFKC"]


class CorpusSource(Source):
    """Files of documents: JSON lines, Parquet, text, a Hugging Face dataset on disk, or a folder of
    such files, which are found below it."""

    rules: list[Rule] | None = None
    """quality rules in place of the recipe's: those of web pages would remove code, for example"""
    languages: list[str] | None = None
    """languages in place of the recipe's"""


class CorpusRecipe(Recipe):
    """Clean, deduplicate and tokenise documents, a shard for each part of the input."""

    sources: list[CorpusSource] = Field(min_length=1)
    """[[sources]] tables: {path, source, rules, languages, format}; `source` names the folder of
    what becomes of it (the file's name without it), and documents that do not name theirs"""
    document_separator: str | None = None
    """cuts .txt files into documents; None: each file is one"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""

    form: Form | None = "NFC"
    """Unicode normalisation form; line ends become \\n and control characters go with either"""
    languages: list[str] = Field(default=[])
    """keep documents in these alone (see `corpus.language`); empty for all"""
    rules: list[Rule] = Field(default=[])
    """quality rules that a document must pass: "gopher" and "gopher_repetition" (Rae et al. 2021,
    appendix A.1.1), "c4" (Raffel et al. 2020, section 2.2), which removes lines too"""
    evaluation: list[Path] = Field(default=[])
    """files of evaluation sets, in any form: a document that has `ngram` words in a row with one of
    their texts is removed"""
    ngram: int = Field(default=13, ge=8)
    """words (Brown et al. 2020, appendix C: 13; shorter texts count whole, from 8 words on)"""
    personal_data: bool = True
    """replace e-mail addresses, phone numbers, public IP addresses and card numbers by their kind,
    such as <EMAIL>"""
    most_personal_data: float | None = Field(default=None, gt=0)
    """remove all of an origin (what a record's `source` names; of an address its host) that has
    more such items per 1,000 words (Llama 2, section 2.1 removes sites with a high volume)"""
    duplicates: bool = True
    """remove all but the first of equal documents, of all sources"""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """remove documents of which at least this share of the runs of three words is that of an
    earlier one (Jaccard similarity; Lee et al. 2022: 0.8). Needs datasketch"""

    tokenizer: Path | None = None
    """tokenizer.model, tokenizer.json or a folder with one: for token shards; None for text
    alone"""
    text: bool = True
    """write what is left as JSON lines"""
    chunk_bytes: int = Field(default=64 * 2**20, gt=0)
    """of the input that becomes a shard: files are cut at lines where they can be, and small ones
    put together"""
    workers: int | None = Field(default=None, gt=0)
    """processes; None for as many as the machine gives this one"""

    neutral: ClassVar[tuple[str, ...]] = ("workers",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tokenizer is None and not self.text:
            raise ValueError("give a tokenizer, or text = true: nothing would be written")
        for key, languages in [
            ("languages", self.languages),
            *((f"sources.{i}.languages", s.languages or []) for i, s in enumerate(self.sources)),
        ]:
            if unknown := sorted(set(languages) - set(LANGUAGES)):
                raise ValueError(
                    f"{key}: expected some of {', '.join(LANGUAGES)}, got {unknown[0]!r}"
                )
        for source in self.sources:
            source.require_meaning("document")
        named = [self.name(i) for i in range(len(self.sources))]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"sources: two are called {twice[0]!r}: name them by `source`")
        return self

    def name(self, index: int) -> str:
        """What the source's folders are called."""
        source = self.sources[index]
        given = source.source or source.path.name.partition(".")[0] or f"source-{index}"
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in given).strip(".") or "-"

    def rules_of(self, index: int) -> list[Rule]:
        """The quality rules of a source, in the order in which they apply."""
        own = self.sources[index].rules
        asked = self.rules if own is None else own
        return [rule for rule in RULES if rule in asked]

    def languages_of(self, index: int) -> list[str]:
        own = self.sources[index].languages
        return self.languages if own is None else own
