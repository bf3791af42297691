"""Values that many formats share: text, scores, message lists in either spelling, transcripts."""

from __future__ import annotations

import math
import re
from typing import Any

from llama2rt.data.records import shown, type_name
from llama2rt.errors import InputError

Row = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def text(row: Row, key: str) -> str:
    """``row[key]``; InputError naming the key unless it is text."""
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key}: expected text, got {type_name(value)}")
    return value


def choice(row: Row, key: str) -> int:
    """``row[key]``, 0 or 1."""
    value = row[key]
    if isinstance(value, bool) or value not in (0, 1):
        raise InputError(f"{key}: expected 0 or 1, got {shown(value)}")
    return int(value)


def score(key: str, value: Any) -> float:
    """A finite number, also one written as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{key}: expected a number, got {shown(value)}") from None
    except OverflowError:
        raise InputError(f"{key}: a number too large to hold") from None
    if not math.isfinite(number):  # it would rank as neither above nor below another
        raise InputError(f"{key}: expected a finite number, got {shown(value)}")
    return number


def user(content: str) -> list[Row]:
    """A conversation of one user's turn."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}


def messages(key: str, value: Any) -> list[Any]:
    """A message list with ShareGPT's from/value spelt as role/content; plain text as a user's
    turn. Further keys of a message stay, for the record's check to name."""
    if isinstance(value, str):
        return user(value)
    if not isinstance(value, list):
        raise InputError(f"{key}: expected text or a list of messages, got {type_name(value)}")
    return [_message(message) for message in value]


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role = message["from"]
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message["value"], **rest}


def answer(prompt: list[Any], side: str, value: Any) -> Any:
    """The answer's text: the value itself, or the last of its messages when those before it repeat
    the prompt or are absent."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise InputError(f"{side}: expected text, got {type_name(value)}")
        return value
    value = messages(side, value)
    if not value or not isinstance(value[-1], dict) or value[-1].get("role") != "assistant":
        raise InputError(f"{side}: the last message must be the assistant's")
    if len(value) > 1 and value[:-1] != prompt:
        raise InputError(f"{side}: its context differs from the prompt")
    if extra := value[-1].keys() - {"role", "content"}:
        raise InputError(f"{side}: the last message has the keys {', '.join(sorted(extra))} too")
    if "content" not in value[-1]:
        raise InputError(f"{side}: the last message has no content")
    return text({side: value[-1]["content"]}, side)


def is_transcript(value: Any) -> bool:
    """Whether a text is a whole dialogue in Anthropic's form."""
    return isinstance(value, str) and _TURN.match(value) is not None


def transcript(side: str, value: str) -> list[Row]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; the last may be blank."""
    start, *parts = _TURN.split(value)
    if start.strip() or not parts:
        raise InputError(f"{side}: a transcript must begin with a 'Human:' turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
