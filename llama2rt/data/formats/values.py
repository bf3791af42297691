"""Values that many formats share: text, scores, message lists in either spelling, transcripts."""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

from llama2rt.data.json_values import shown, type_name
from llama2rt.errors import InputError

Row = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_NVIDIA_TURN = re.compile(r"<extra_id_1>(User|Assistant)(?:\n|\Z)")
# A question may be about such a tag: it counts only where what a template writes after it follows.
_TEMPLATED = re.compile(
    r"(?:<s>|<bos>|<\|begin_of_text\|>)?\s*(?:"
    r"<\|im_start\|>\w+(?:[ \t\r]*\n|<\|im_sep\|>)|"
    r"<\|start_header_id\|>\w+<\|end_header_id\|>|"
    r"<start_of_turn>\w+[ \t\r]*\n|"
    r"<\|(?:system|user|prompter|assistant)\|>"
    r"(?:[ \t\r]*\n|.*?<\|end(?:oftext)?\|>\s*<\|(?:user|prompter|assistant)\|>)|"
    r"### Human:.*\n### Assistant:)",
    re.DOTALL,
)
_MESSAGES_BEGIN = re.compile(r"""\s*\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_LONGEST_PYTHON = 1_000_000
"""characters that Python's parser is given, which is far slower than JSON's"""


def text(row: Row, key: str) -> str:
    """`row[key]`; InputError naming the key unless it is text, and for a message list that some
    program wrote as text, in JSON's or Python's spelling."""
    value = bare_text(row, key)
    require_no_messages(key, value)
    return value


def bare_text(row: Row, key: str) -> str:
    """`text` without the check for a message list, which the record's own check makes for each of
    several answers, so that one bad answer costs only its own pairs."""
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key}: expected text, got {type_name(value)}")
    return value


def require_no_messages(key: str, value: str) -> None:
    """InputError for a message list written as text. Other lists of objects may be an answer in
    JSON."""
    if not _MESSAGES_BEGIN.match(value):
        return
    items = _parsed(value)
    if (
        isinstance(items, list)
        and items
        and all(isinstance(item, dict) and item.keys() in _MESSAGE_KEYS for item in items)
        and all(isinstance(inner, str) for item in items for inner in item.values())
    ):
        raise _list_as_text(key)


def _parsed(value: str) -> Any:
    """What JSON or Python reads from `value`; None for a text that is neither."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if len(value) > _LONGEST_PYTHON:
        return None
    # NumPy's arrays of objects, which pandas makes of a Parquet file's lists, have no commas.
    for spelling in (value, re.sub(r"\}\s+\{", "}, {", value)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes in somebody's text
                return ast.literal_eval(spelling.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _list_as_text(key: str) -> InputError:
    return InputError(f"{key}: holds a list written as text; write the list itself")


def item(where: str, value: Any, *keys: str) -> Row:
    """`value`, an object with `keys`; InputError that names `where` for any other value."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {type_name(value)}")
    for key in keys:
        if key not in value:
            raise InputError(f"{where} has no {key}")
    return value


def choice(row: Row, key: str) -> int:
    """`row[key]`, 0 or 1."""
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
    """The messages of the text `row[key]`: a user's turn, or the turns of a conversation written
    out in Anthropic's form or in NVIDIA's (HelpSteer2). InputError as `text`; for a list of turns
    written as JSON; for the output of a chat template, to which ours would be applied again; and
    for a conversation whose roles do not alternate, or that ends with an answer."""
    what, turns = _written_out(row, key)
    if turns[-1]["role"] == "assistant":
        if turns[-1]["content"]:
            raise InputError(
                f"{key}: read as {what}, which ends with an answer; expected the user's turn or "
                "an empty one of the assistant at its end",
                "role_order",
            )
        turns = turns[:-1]  # the one to be written
    for number, turn in enumerate(turns, start=1):
        expected = "user" if number % 2 else "assistant"
        if turn["role"] != expected:
            raise InputError(
                f"{key}: read as {what}, whose turn {number} is the {turn['role']}'s; expected the "
                f"{expected}'s",
                "role_order",
            )
    return turns


def _written_out(row: Row, key: str) -> tuple[str, list[Row]]:
    """The turns of the text `row[key]`, at least one, and what it was read as."""
    value = text(row, key)
    if _is_json_of_strings(value):
        raise _list_as_text(key)
    if _TEMPLATED.match(value.lstrip()):
        raise InputError(f"{key}: laid out by a chat template; write its messages or bare text")
    if is_transcript(value):
        return "a transcript (Human:/Assistant:)", transcript(key, value)
    return "turns after <extra_id_1>", _nvidia_turns(value) or user(value)


def _nvidia_turns(value: str) -> list[Row]:
    """The turns of "...\\n<extra_id_1>Assistant\\n...\\n<extra_id_1>User\\n..."; none of a text
    whose markers do not alternate: it is a text about them."""
    first, *parts = _NVIDIA_TURN.split(value)
    named = list(zip(parts[::2], parts[1::2], strict=True))
    if first.strip():
        named.insert(0, ("User", first))
    alternate = all(
        name == ("Assistant" if index % 2 else "User") for index, (name, _) in enumerate(named)
    )
    if not parts or not alternate or value.count("<extra_id_1>") > len(parts) // 2:
        return []
    return _turns(named)


def _is_json_of_strings(value: str) -> bool:
    if not value.lstrip().startswith('["'):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return all(isinstance(item, str) for item in items)


def messages(key: str, value: Any, *, finished: bool = False) -> list[Any]:
    """A message list with ShareGPT's from/value spelt as role/content; of a text, its
    `conversation`, or all turns of a `finished` one. Further keys of a message stay, for the
    record's check to name."""
    if isinstance(value, str):
        row = {key: value}
        return _written_out(row, key)[1] if finished else conversation(row, key)
    if not isinstance(value, list):
        raise InputError(f"{key}: expected text or a list of messages, got {type_name(value)}")
    return [_message(message) for message in value]


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    if {"role", "content"} & message.keys():  # both spellings: the record's check refuses it
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role = message["from"]
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message["value"], **rest}


def finished(said: Any) -> bool:
    """Whether a message list is a whole dialogue, as in UltraFeedback binarized, and no prompt."""
    last = said[-1] if isinstance(said, list) and said else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def answer(prompt: list[Any], side: str, value: Any) -> Any:
    """The answer's text: the value itself, or the last of its messages when those before it repeat
    the prompt or are absent."""
    if not isinstance(value, list):
        return text({side: value}, side)
    value = messages(side, value)
    if not value or not isinstance(value[-1], dict) or value[-1].get("role") != "assistant":
        raise InputError(f"{side}: the last message must be the assistant's", "role_order")
    if len(value) > 1 and value[:-1] != prompt:
        raise InputError(f"{side}: its context differs from the prompt", "different_contexts")
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
        raise InputError(f"{side}: a transcript must begin with a 'Human:' turn", "role_order")
    return _turns(zip(parts[::2], parts[1::2], strict=True))


def _turns(named: Iterable[tuple[str, str]]) -> list[Row]:
    roles = {"Human": "user", "User": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": content.strip()} for name, content in named]
