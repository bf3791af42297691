"""Values of a JSON object, as messages call and show them."""

import difflib
import json
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from llama2rt.errors import InputError


def without_nulls(value: Any) -> Any:
    """`value` without the keys of objects, at any depth, whose value is null."""
    try:
        return _without_nulls(value)
    except RecursionError:
        raise InputError("nested too deeply") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@lru_cache(maxsize=1024)  # the same keys come with every row of a file
def misspelt(key: str, known: tuple[str, ...]) -> str | None:
    """The one of `known` that `key` was probably meant to be."""
    # Folded, because a capital counts as another letter: "Kind" is far from "kind".
    folded = key.strip().casefold()
    return next(iter(difflib.get_close_matches(folded, known, n=1, cutoff=0.8)), None)


def type_name(value: Any) -> str:
    """The type of a value in JSON's terms, for a message."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list"}
    names |= {dict: "an object", int: "a number", float: "a number", Decimal: "a number"}
    if isinstance(value, date | time | timedelta):
        # Programs that guess types make timestamps of a column that holds only dates.
        return "a timestamp: write the column as text"
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A JSON value as it stands in a file, shortened; the type of any other."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return type_name(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str, most: int) -> str:
    """`text` as any terminal shows it: characters that are not printable (control characters, lone
    surrogates) escaped, and cut in the middle where it is longer than `most` characters."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 5]} ... {text[-end:]}"
