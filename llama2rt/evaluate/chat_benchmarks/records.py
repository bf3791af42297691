"""What the three benchmarks share: questions, answers, and rows of files, checked."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2rt.data.files import rows
from llama2rt.data.json_values import type_name
from llama2rt.errors import InputError
from llama2rt.evaluate.judges.speakers import Reply

logger = logging.getLogger("llama2rt.evaluate.chat_benchmarks")

Id = int | str


@dataclass(frozen=True)
class Question:
    """What is asked, one text a turn."""

    id: Id
    turns: tuple[str, ...]
    category: str = ""
    reference: tuple[str, ...] = ()
    """right answers, one a turn, where the benchmark has them"""


@dataclass(frozen=True)
class Answers:
    """One model's answers."""

    model: str
    turns: Mapping[Id, tuple[str, ...]]
    """one text a turn, by question"""


@dataclass(frozen=True)
class Answered:
    """A question with replies that were just given."""

    question: Question
    replies: tuple[Reply, ...]


def objects(
    path: Path, required: Collection[str], carried: Collection[str] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(FILE:LINE, row) of JSON lines or a JSON array. InputError with it for a row that is no
    object or lacks a key of `required`, and for a file without any; keys that are neither of these
    nor of `carried` are counted and said."""
    unused: Counter[str] = Counter()
    count = 0
    for number, row in rows(path, "record", None):
        where = f"{path}:{number}"
        if isinstance(row, InputError):
            raise InputError(f"{where}: {row}")
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a JSON object, got {type_name(row)}")
        for key in required:
            if key not in row:
                raise InputError(f"{where}: missing key {key!r}")
        unused.update(row.keys() - {*required, *carried})
        count += 1
        yield where, row
    if not count:
        raise InputError(f"{path}:1: no records")
    for key, times in unused.items():
        logger.warning("%s: key not used: %s (%d rows)", path, key, times)


def text(where: str, key: str, value: Any, *, blank: bool = False) -> str:
    """`value` where it is text; InputError otherwise."""
    if not isinstance(value, str) or not (blank or value.strip()):
        expected = "text" if blank else "text that is not blank"
        found = repr(value[:40]) if isinstance(value, str) else type_name(value)
        raise InputError(f"{where}: {key}: expected {expected}, got {found}")
    return value


def identifier(where: str, key: str, value: Any) -> Id:
    """`value` where it is an id: text, or a whole number; InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{where}: {key}: expected text or a whole number, got {type_name(value)}")
    return value


def texts(where: str, key: str, value: Any) -> tuple[str, ...]:
    """`value` where it is a list of texts, not empty; InputError otherwise."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key}: expected a list of texts, got {type_name(value)}")
    return tuple(text(where, f"{key}[{i}]", one, blank=True) for i, one in enumerate(value))


def new(where: str, key: str, value: Any, seen: dict[Any, str]) -> None:
    """InputError where `value` was seen before."""
    if value in seen:
        raise InputError(f"{where}: {key}: {value!r} is that of {seen[value]} too")
    seen[value] = where


def judged_once(
    where: str, row: Mapping[str, Any], models: Collection[str], question: Id, seen: dict[Any, str]
) -> None:
    """InputError where the same judge has judged the same question and turn of `models`, in either
    order of the two, before; `seen` has FILE:LINE of what was read so far, of all files.

    It would count as two. Which one is meant the files do not say: FastChat (0.2.36) appends when
    it judges again, its show_result.py counts both, its clean_judgment.py keeps the first, and its
    browser shows the last.
    """
    judge = json.dumps(row.get("judge"), sort_keys=True, ensure_ascii=False)
    turn = row.get("turn")
    key = (judge, frozenset(models), question, turn)
    if key in seen:
        of_turn = "" if turn is None else f", turn {turn}"
        raise InputError(
            f"{where}: question {question!r}{of_turn} of {' and '.join(models)}: judged in "
            f"{seen[key]} too, by the same judge; keep one"
        )
    seen[key] = where


def required(answers: Answers, question: Question, path: Path | str) -> tuple[str, ...]:
    """The answers to `question`; InputError where a turn has none."""
    found = answers.turns.get(question.id, ())
    if len(found) < len(question.turns):
        raise InputError(
            f"{path}: question {question.id!r} has {len(question.turns)} turns, {answers.model} "
            f"answers {len(found)}"
        )
    return found
