"""Which records of valid files are not worth learning from (`[filters]` in a recipe).

Sources: Dong et al. 2024 (arXiv 2405.07863, section 2) drop empty turns, odd or wrongly ordered
roles, different contexts, labels that other fields contradict, and pairs whose scores differ
little; Llama 2 (section 3.2.1) excludes pairs whose chosen answer is unsafe and the other safe.

Two places apply them. Faults of a row that no record can hold (an empty turn, an order of roles)
are errors of the reader, unless their filter is on: then it leaves the row out (`removed.Removed`).
What only whole records show (duplicates, contradictions between rows, lengths in tokens) is left
out by `keep`, of all files together, in their order: of equal records the first stays.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from llama2rt.data.near_duplicates import earlier_alike
from llama2rt.data.records import (
    RATINGS,
    Comparison,
    Dialogue,
    Document,
    Messages,
    Prompt,
    Record,
)
from llama2rt.data.removed import Removed
from llama2rt.errors import InputError, naming
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

_CONVERSATIONS = ("dialogue", "prompt", "comparison")
# The kinds of record that each filter applies to.
_APPLIES_TO = {
    "empty_turns": _CONVERSATIONS,
    "role_order": _CONVERSATIONS,
    "different_contexts": ("comparison",),
    "identical_responses": ("comparison",),
    "unsafe_chosen": ("comparison",),
    "contradicting_labels": ("comparison",),
    "small_margin": ("comparison",),
    "least_rating": ("comparison",),
    "longest": _CONVERSATIONS,
    "duplicates": ("document", *_CONVERSATIONS),
    "near_duplicates": ("document", *_CONVERSATIONS),
}
NAMES = tuple(_APPLIES_TO)


class Filters(BaseModel):
    """What is left out of files of records. Off by default; of a record that several filters would
    leave out, the first in this order counts it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    empty_turns: bool = False
    """a turn or an answer that is blank"""
    role_order: bool = False
    """a role that is not system, user or assistant, one out of turn, or the wrong one at the end"""
    different_contexts: bool = False
    """comparisons whose two answers follow different conversations"""
    identical_responses: bool = False
    """comparisons of an answer with itself"""
    unsafe_chosen: bool = False
    """comparisons by safety whose chosen answer is unsafe and the other safe (Llama 2, section
    3.2.1)"""
    contradicting_labels: bool = False
    """comparisons whose own scores put the chosen answer below the other, and all of those that
    choose, between the same two answers to the same prompt, both ways"""
    small_margin: float = Field(default=0.0, ge=0)
    """comparisons whose answers' scores differ by less, in the scale of the file's scores; those
    without scores stay (a source's minimum_score_difference wants scores)"""
    least_rating: Literal["significantly_better", "better", "slightly_better"] | None = None
    """comparisons rated as closer than this; those without a rating stay"""
    longest: int | None = Field(default=None, gt=0)
    """records of more tokens, in the chat format; of a comparison the longer side counts"""
    duplicates: bool = False
    """all but the first of the same text; comparisons of another kind or another rater, or with the
    other answer chosen, are none"""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """all but the first of almost the same text, such as 0.8: in every part (earlier turns, last
    question, each answer) at least this share of the runs of three words is the same (Jaccard
    similarity). Needs datasketch"""

    @property
    def active(self) -> tuple[str, ...]:
        """The names of those that are on."""
        return tuple(n for n in NAMES if getattr(self, n) not in (False, None, 0.0))

    def require_meaning(self, kind: str) -> None:
        """InputError for a filter that is on and does not apply to records of `kind`."""
        for name in self.active:
            if kind not in _APPLIES_TO[name]:
                raise InputError(f"filters.{name}: means nothing to {kind}s")

    @classmethod
    def usual(cls, kind: str) -> "Filters":
        """All that need neither a tokenizer nor a scale, for records of `kind`."""
        flags = [n for n in NAMES if cls.model_fields[n].annotation is bool]
        given: dict[str, Any] = {name: True for name in flags if kind in _APPLIES_TO[name]}
        return cls(**given, near_duplicates=0.8 if kind in _APPLIES_TO["near_duplicates"] else None)


NO_FILTERS = Filters()


class Located(NamedTuple):
    """A record and where it was read."""

    record: Any
    path: Path
    line: int

    @property
    def where(self) -> str:
        """FILE:LINE"""
        return f"{self.path}:{self.line}"


Wrong = Callable[[Sequence[Located]], Iterable[tuple[int, str]]]
"""finds (index, reason) of those that a filter leaves out"""


def keep(
    filters: Filters, found: Sequence[Located], removed: Removed, tokenizer: Tokenizer | None = None
) -> list[int]:
    """The indices of those records that `filters` leave, in order; what they leave out is added to
    `removed`. The records of all files are given at once. InputError for `longest` without a
    tokenizer, and for near_duplicates where datasketch is missing."""
    kept = list(range(len(found)))
    for name, wrong in _of_records(filters, tokenizer):
        part = [found[i] for i in kept]
        reasons = dict(wrong(part))
        for index, reason in sorted(reasons.items()):
            removed.add(name, part[index].where, reason)
        kept = [i for position, i in enumerate(kept) if position not in reasons]
    return kept


def _of_records(filters: Filters, tokenizer: Tokenizer | None) -> Iterable[tuple[str, Wrong]]:
    if filters.least_rating is not None:
        rank = RATINGS.index(filters.least_rating)
        yield "least_rating", lambda found: _rated_below(found, rank)
    if (longest := filters.longest) is not None:
        if tokenizer is None:
            raise InputError("filters.longest: counts tokens, and no tokenizer is given")
        yield "longest", lambda found: _longer(found, longest, tokenizer)
    if filters.duplicates:
        yield "duplicates", _equal
    if filters.contradicting_labels:
        yield "contradicting_labels", _chosen_both_ways
    if (least := filters.near_duplicates) is not None:
        yield "near_duplicates", lambda found: _alike(found, least)


def tokens(record: Record, tokenizer: Tokenizer) -> int:
    """Tokens of a record in the chat format, of a comparison those of its longer side. InputError
    for text that cannot be encoded."""
    if isinstance(record, Comparison):
        answers = (record.chosen, record.rejected)
        return max(len(chat.encode_response(tokenizer, record.prompt, a)[0]) for a in answers)
    if isinstance(record, Dialogue):
        return len(chat.encode_dialogue(tokenizer, record.messages)[0])
    assert isinstance(record, Prompt)
    return len(chat.encode_prompt(tokenizer, record.messages))


def parts(record: Record) -> tuple[str, ...]:
    """The texts in which near-duplicates are alike: of a conversation what was said before the last
    question, that, and each answer; of a document its text."""
    if isinstance(record, Document):
        return (record.text,)
    messages, answers = conversation(record)
    *before, question = messages
    return ("\n".join(message["content"] for message in before), question["content"], *answers)


def conversation(record: Record) -> tuple[Messages, tuple[str, ...]]:
    """(what is to be answered, the answers): two of a comparison, one of a dialogue, none of a
    prompt."""
    if isinstance(record, Comparison):
        return record.prompt, (record.chosen, record.rejected)
    if isinstance(record, Dialogue):
        return record.messages[:-1], (record.messages[-1]["content"],)
    assert isinstance(record, Prompt)
    return record.messages, ()


def _identity(record: Record) -> tuple[Any, ...]:
    """What two records have in common that are the same; a comparison's answers come last."""
    if isinstance(record, Document):
        return (record.text.strip(),)
    messages, answers = conversation(record)
    asked = tuple((message["role"], message["content"].strip()) for message in messages)
    # Of the same words another answer may be learned.
    kind = getattr(record, "learned" if isinstance(record, Dialogue) else "kind", None)
    return (kind, asked, *(answer.strip() for answer in answers))


def _rated_below(found: Sequence[Located], rank: int) -> Iterable[tuple[int, str]]:
    for index, (record, *_) in enumerate(found):
        if record.rating is not None and RATINGS.index(record.rating) > rank:
            yield index, f"rated {record.rating}"


def _longer(
    found: Sequence[Located], longest: int, tokenizer: Tokenizer
) -> Iterable[tuple[int, str]]:
    for index, one in enumerate(found):
        with naming(one.where):
            count = tokens(one.record, tokenizer)
        if count > longest:
            yield index, f"{count:,} tokens"


def _equal(found: Sequence[Located]) -> Iterable[tuple[int, str]]:
    first: dict[tuple[Any, ...], int] = {}
    for index, (record, *_) in enumerate(found):
        key = (*_identity(record), getattr(record, "rater", ""))
        if (earlier := first.setdefault(key, index)) != index:
            yield index, f"the same as {found[earlier].where}"


def _chosen_both_ways(found: Sequence[Located]) -> Iterable[tuple[int, str]]:
    ways: dict[tuple[Any, ...], list[int]] = {}
    for index, (record, *_) in enumerate(found):
        ways.setdefault(_identity(record), []).append(index)
    for (kind, asked, chosen, rejected), indices in ways.items():
        if opposite := ways.get((kind, asked, rejected, chosen)):
            where = found[opposite[0]].where
            yield from ((index, f"{where} chooses the other answer") for index in indices)


def _alike(found: Sequence[Located], least: float) -> Iterable[tuple[int, str]]:
    # As for duplicates: what another rater, or the other kind's, says of the same text is another.
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, one in enumerate(found):
        said_by = tuple(getattr(one.record, key, None) for key in ("kind", "rater", "learned"))
        groups.setdefault(said_by, []).append(index)
    for group in groups.values():
        texts = [parts(found[index].record) for index in group]
        for index, earlier, similarity in earlier_alike(texts, least):
            yield group[index], f"{similarity:.2f} alike {found[group[earlier]].where}"
