"""`llama2rt recall`: the multi-turn test of an instruction, on any language model's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import ValidationError

from llama2rt.checkpoint import load
from llama2rt.data import instructions
from llama2rt.data.readers import read
from llama2rt.data.records import Messages
from llama2rt.errors import InputError, naming
from llama2rt.evaluate import recall
from llama2rt.evaluate.recall import RecallOptions
from llama2rt.generate import Engine
from llama2rt.model import Llama
from llama2rt.rollout.turns import Place, Turns
from llama2rt.text import chat


def command(
    models: tyro.conf.Positional[tuple[Path, ...]],
    *,
    dialogues: tuple[Path, ...],
    attributes: Path | None = None,
    place: Place = "system",
    turns: tuple[int, ...] = (2, 4, 6, 20),
    limit: int = 200,
    temperature: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Whether a model still follows the first turn's instruction at later turns.

    Args:
        models: Folders of language models; all get the same dialogues and instructions.
        dialogues: Files of dialogues whose user messages are asked.
        attributes: TOML file of what instructions are made of, with the rules that check them;
            by default a small list of hobbies, languages and public figures.
        place: Where the instruction stands in the first turn.
        turns: Turns that are looked at.
        limit: Most dialogues that are answered.
        temperature: Of sampling; 0 takes the likeliest token.
        max_tokens: Longest answer, in tokens.
        seed: Of instructions and sampling.
        as_json: Print one JSON object.
    """
    options = _options(turns, limit, temperature)
    if not models:
        raise InputError("models: name at least one")
    if max_tokens < 1:
        raise InputError(f"max_tokens: expected at least 1, got {max_tokens}")
    known = instructions.read(attributes)
    records = read(list(dialogues), "dialogue")
    asked = recall.questions([Turns.of(record) for record in records], options)
    told = recall.draw(known, len(asked), seed)
    # All folders are read without their weights first: bad input should cost no sampling.
    firsts = [
        one.opened(told.text, place).messages([]) for one, told in zip(asked, told, strict=True)
    ]
    for folder in models:
        _require_room(folder, firsts, max_tokens)
    found = {}
    for folder in models:
        model, tokenizer = load(folder, "cuda" if torch.cuda.is_available() else "cpu")
        assert isinstance(model, Llama)
        found[str(folder)] = recall.measure(
            Engine(model, tokenizer),
            asked,
            told,
            options,
            place=place,
            max_tokens=max_tokens,
            seed=seed,
        )
    if as_json:
        print(json.dumps(found))
    else:
        print("\n".join(recall.describe(name, rows) for name, rows in found.items()))


def _options(turns: tuple[int, ...], limit: int, temperature: float) -> RecallOptions:
    if limit < 1:
        raise InputError(f"limit: expected at least 1, got {limit}")
    try:
        return RecallOptions(turns=list(turns), limit=limit, temperature=temperature)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, message = first["loc"][0], first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {message}") from None


def _require_room(folder: Path, firsts: Sequence[Messages], max_tokens: int) -> None:
    """InputError unless the language model in `folder` can answer one of `firsts`; what it cannot
    is left out and counted."""
    outline, tokenizer = load(folder, "meta")
    if not isinstance(outline, Llama):
        raise InputError(f"{folder}: expected a language model, found a reward model")
    if tokenizer is None:
        raise InputError(f"{folder}: holds no tokenizer")
    with naming(str(folder)):
        length = min(len(chat.encode_prompt(tokenizer, first)) for first in firsts)
    if length + max_tokens > outline.config.context:
        raise InputError(
            f"{folder}: its context of {outline.config.context} tokens has no room for any first "
            f"turn, {length} at least, and an answer of max_tokens, {max_tokens}"
        )
