"""JSON without NaN and without a key twice, whose errors are InputErrors.

Python's `json` takes the last of two equal keys and reads NaN, so that a value would be lost or
wrong without a message.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from llama2rt.errors import InputError


def parse(text: str) -> Any:
    """The value of `text`; InputError with the reason and the column."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"invalid JSON: {_reason(error)}") from None


def items(text: str) -> Iterator[Any]:
    """The items of an array; an InputError in the place of one that cannot be taken. Raises
    InputError with `NUMBER: reason` at the item, from 1, where the text stops being an array of
    JSON, since nothing behind that can be told apart."""
    decoder = json.JSONDecoder(
        parse_constant=lambda name: _Fault(f"{name} is not a number that JSON or we accept"),
        object_pairs_hook=_unique_or_fault,
    )
    at = _skip(text, _skip(text, 0) + 1)  # behind the bracket
    number = 1
    while text[at : at + 1] != "]":
        if number > 1:
            if text[at : at + 1] != ",":
                raise InputError(f"{number}: invalid JSON: no comma or ] before it")
            at = _skip(text, at + 1)
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{number}: invalid JSON: {_reason(error)}{line}") from None
        fault = _fault_in(value)
        yield InputError(fault.reason) if fault else value
        at = _skip(text, at)
        number += 1
    if end := text[at + 1 :].strip():
        raise InputError(f"{number}: invalid JSON: {end[:20]!r} behind the array")


class _Fault:
    """Replaces a value that an array's item must not hold: an error would lose the item's end."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _fault_in(value: Any) -> _Fault | None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Fault):
            return item
        waiting += (
            item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        )
    return None


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        # Some of the library's messages end in "at".
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)  # an integer of thousands of digits


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a number that JSON or we accept")


def _twice(pairs: list[tuple[str, Any]]) -> str | None:
    if len({key for key, _ in pairs}) == len(pairs):
        return None
    key = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
    return f"key {key!r} occurs twice"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if reason := _twice(pairs):
        raise InputError(reason)
    return dict(pairs)


def _unique_or_fault(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Fault:
    reason = _twice(pairs)
    return _Fault(reason) if reason else dict(pairs)
