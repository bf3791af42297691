"""Values that many formats share: text, scores, message lists in either spelling, transcripts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from llama2rt.data.records import shown, type_name
from llama2rt.errors import InputError

Row = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_NVIDIA_TURN = re.compile(r"<extra_id_1>(User|Assistant)(?:\n|\Z)")
_TEMPLATED = re.compile(
    r"(?:<s>|<bos>|<\|begin_of_text\|>)?\s*(?:<\|im_start\|>|<\|start_header_id\|>|"
    r"<start_of_turn>|<\|(?:system|user|prompter|assistant)\|>|### Human:.*### Assistant:)",
    re.DOTALL,
)
_MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:.*\}\s*\]\s*""", re.DOTALL
)


def text(row: Row, key: str) -> str:
    """``row[key]``; InputError naming the key unless it is text, and for a message list that some
    program wrote as text, in JSON's or Python's spelling."""
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key}: expected text, got {type_name(value)}")
    if _MESSAGES_AS_TEXT.fullmatch(value):
        raise _list_as_text(key)
    return value


def _list_as_text(key: str) -> InputError:
    return InputError(f"{key}: holds a list written as text; write the list itself")


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


def conversation(row: Row, key: str) -> list[Row]:
    """What the text ``row[key]`` asks: a user's turn, or the turns of a conversation written out in
    Anthropic's form or in NVIDIA's (HelpSteer2). InputError as ``text``, for a list of turns
    written as JSON, and for what a chat template laid out, which ours would lay out again."""
    value = text(row, key)
    if _is_json_of_strings(value):
        raise _list_as_text(key)
    if _TEMPLATED.match(value.lstrip()):
        raise InputError(f"{key}: laid out by a chat template; write its messages or bare text")
    if is_transcript(value):
        turns = transcript(key, value)
    elif _NVIDIA_TURN.search(value):
        first, *parts = _NVIDIA_TURN.split(value)
        named = zip(parts[::2], parts[1::2], strict=True)
        turns = _turns([*([("User", first)] if first.strip() else []), *named])
    else:
        return user(value)
    blank = turns[-1]["role"] == "assistant" and not turns[-1]["content"]  # the one to be written
    return turns[:-1] if blank else turns


def _is_json_of_strings(value: str) -> bool:
    if not value.lstrip().startswith('["'):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return all(isinstance(item, str) for item in items)


def messages(key: str, value: Any) -> list[Any]:
    """A message list with ShareGPT's from/value spelt as role/content; of a text, its
    ``conversation``. Further keys of a message stay, for the record's check to name."""
    if isinstance(value, str):
        return conversation({key: value}, key)
    if not isinstance(value, list):
        raise InputError(f"{key}: expected text or a list of messages, got {type_name(value)}")
    return [_message(message) for message in value]


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    if {"role", "content"} & message.keys():  # which of the two speaks is not ours to say
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role = message["from"]
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message["value"], **rest}


def answer(prompt: list[Any], side: str, value: Any) -> Any:
    """The answer's text: the value itself, or the last of its messages when those before it repeat
    the prompt or are absent."""
    if not isinstance(value, list):
        return text({side: value}, side)
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
    """Whether a text is a whole dialogue in Anthropic's form, also one that has been stripped."""
    return isinstance(value, str) and (
        value.startswith(("\n\nHuman:", "\n\nAssistant:"))
        or (value.lstrip().startswith("Human:") and "\n\nAssistant:" in value)
    )


def transcript(side: str, value: str) -> list[Row]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; the last may be blank."""
    start, *parts = _TURN.split(value)
    if start.strip() or not parts:
        raise InputError(f"{side}: a transcript must begin with a 'Human:' turn")
    return _turns(zip(parts[::2], parts[1::2], strict=True))


def _turns(named: Iterable[tuple[str, str]]) -> list[Row]:
    roles = {"Human": "user", "User": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": content.strip()} for name, content in named]
