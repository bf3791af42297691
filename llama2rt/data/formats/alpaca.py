"""Alpaca's rows of `instruction`, `input` and `output`, and LLaMA-Factory's with a `history`.

`input` is what the instruction is about and often blank; the first release also writes "No input",
"noinput" or "<noinput>" there (README of gururise/AlpacaDataCleaned). `text` repeats the row laid
out by Alpaca's own template (card of tatsu-lab/alpaca). `history` holds earlier turns, a list of
pairs of an instruction and its answer (data/README of LLaMA-Factory); `system` is read as in every
format.
"""

from collections.abc import Iterator
from typing import Any

from llama2rt.data.formats.registry import Row, register, stateless
from llama2rt.data.formats.values import assistant, conversation, text, user
from llama2rt.errors import InputError

_NO_INPUT = ("noinput", "no input", "none", "n/a")


def _asked(row: Row) -> list[Row]:
    """The turns before the answer. Instruction and input are one turn with a blank line between."""
    instruction = text(row, "instruction")
    about = text(row, "input") if "input" in row else ""
    if about.strip().strip("<>").casefold() in _NO_INPUT:
        about = ""
    if not about.strip():
        return _history(row) + conversation(row, "instruction")
    joined = f"{instruction.rstrip()}\n\n{about}" if instruction.strip() else about
    return _history(row) + conversation({"instruction": joined}, "instruction")


def _history(row: Row) -> list[Row]:
    pairs: Any = row.get("history", [])
    if not isinstance(pairs, list):
        raise InputError("history: expected a list of pairs")
    turns = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or [type(said) for said in pair] != [str, str]:
            raise InputError(f"history: item {number}: expected an instruction and its answer")
        turns += [user(pair[0]), assistant(pair[1])]
    return turns


@register("Alpaca", "dialogue", "instruction output", reads="input history", carries="text")
@stateless
def _alpaca(row: Row) -> Iterator[Row]:
    yield {"messages": [*_asked(row), assistant(text(row, "output"))]}


@register(
    "Alpaca instructions",
    "prompt",
    "instruction",
    lambda row: "output" in row,
    reads="input history",
    carries="output text",
)
@stateless
def _alpaca_prompt(row: Row) -> Iterator[Row]:
    yield {"messages": _asked(row)}
