"""What conversations measure in tokens, by source: the columns of Llama 2's Table 6."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llama2rt.data.filters import conversation
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.errors import InputError, naming
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

# Table 6 gives its columns no definition beyond these names: "each example consists of a prompt
# (including previous dialogue if available) and a response".
COLUMNS = {
    "turns": "user messages in a dialogue",
    "tokens_per_example": "the dialogue with one response, in the chat format",
    "tokens_in_prompt": "the last user message alone",
    "tokens_in_response": "one response alone",
}
TOTAL = "total"


def by_source(
    records: Iterable[Comparison | Dialogue | Prompt], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Of each source, in order of appearance ("none" for records that name none), and of all: the
    number of `records` and the mean of each of `COLUMNS`. A comparison has two examples; a prompt
    has no response and None for that. InputError for a message that cannot be encoded."""
    measured: defaultdict[str, list[list[float]]] = defaultdict(list)
    for record in records:
        measured[getattr(record, "source", "") or "none"].append(_measure(record, tokenizer))
    rows = [_row(source, values) for source, values in measured.items()]
    every = [value for values in measured.values() for value in values]
    return [*rows, _row(TOTAL, every)]


def header(row: Mapping[str, Any]) -> list[str]:
    """The names of a row's columns, for people."""
    return [key.replace("_", " ") for key in row]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's values, as the paper rounds them."""
    shown = []
    for value in row.values():
        if isinstance(value, float):
            shown.append(f"{value:,.1f}")
        elif isinstance(value, int):
            shown.append(f"{value:,}")
        else:
            shown.append(value or "")
    return shown


def _measure(record: Comparison | Dialogue | Prompt, tokenizer: Tokenizer) -> list[float]:
    """The columns of one record, averaged over its answers."""
    messages, answers = conversation(record)
    with naming(f"record whose conversation begins {messages[0]['content'][:60]!r}"):
        if answers:
            examples = [len(chat.encode_response(tokenizer, messages, a)[0]) for a in answers]
        else:
            examples = [len(chat.encode_prompt(tokenizer, messages))]
        prompt = len(tokenizer.encode(messages[-1]["content"]))
        responses = [len(tokenizer.encode(answer)) for answer in answers]
    turns = sum(message["role"] == "user" for message in messages)
    response = float(np.mean(responses)) if responses else np.nan
    return [turns, float(np.mean(examples)), prompt, response]


def _row(source: str, values: list[list[float]]) -> dict[str, Any]:
    if not values:
        raise InputError("no records to measure")
    means = np.mean(values, axis=0)
    named = zip(COLUMNS, means.tolist(), strict=True)
    columns = {name: None if np.isnan(mean) else mean for name, mean in named}
    return {"source": source, "records": len(values), **columns}
