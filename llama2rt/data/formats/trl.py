"""TRL's formats: prompts, completions and preferences, as plain text or as message lists."""

from collections.abc import Iterator
from typing import Any

from llama2rt.data.formats.registry import Convert, Row, Selection, register, stateless
from llama2rt.data.formats.values import (
    answer,
    assistant,
    finished,
    is_transcript,
    messages,
    score,
)
from llama2rt.errors import InputError

_SIDES = ("chosen", "rejected")
# How a pair's scores are called: by UltraFeedback binarized, RLHFlow, Capybara and Argilla (both).
_SPELLINGS = [
    tuple(name.format(side) for side in _SIDES)
    for name in ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating")
]
_SCORES = " ".join(key for keys in _SPELLINGS for key in keys)
# Of UltraFeedback binarized, Capybara and full HH.
_CARRIES = (
    f"{_SCORES} prompt_id messages response conversation original_response generation_prompt "
    "raw_generation_responses new_generations chosen_model rejected_model"
)


def _prompt(row: Row, longer: Any) -> list[Any]:
    """The conversation that a row's prompt stands for. Beside answers of several turns (Capybara,
    UltraFeedback binarized) a prompt of plain text repeats one of their turns: what is `longer`,
    a message list, gives the whole context then."""
    prompt = row["prompt"]
    plain = isinstance(prompt, str) and not is_transcript(prompt)
    if plain and isinstance(longer, list) and longer[2:]:
        return messages("prompt", longer)[:-1]
    return messages("prompt", prompt)


def _pair(prompt: list[Any], row: Row, selection: Selection) -> Iterator[Row]:
    sides = {side: answer(prompt, side, row[side]) for side in _SIDES}
    keys = next((keys for keys in _SPELLINGS if row.keys() >= {*keys}), None)
    if selection.minimum_score_difference:
        if keys is None:
            missing = next(key for key in _SPELLINGS[0] if key not in row)
            raise InputError(f"minimum_score_difference: the row has no {missing}")
        chosen, rejected = (score(key, row[key]) for key in keys)
        if not selection.far_enough(chosen - rejected):
            return
    elif keys is not None:
        try:
            chosen, rejected = (score(key, row[key]) for key in keys)
        except InputError:
            pass  # scores that say nothing contradict nothing
        else:
            selection.unsupported += chosen <= rejected
    yield {"prompt": prompt, **sides}


@register(
    "TRL, explicit prompt",
    "comparison",
    "prompt chosen rejected",
    lambda row: isinstance(row["prompt"], str) or isinstance(row["chosen"], list),
    unless="",
    carries=_CARRIES,
    scores=_SCORES,
)
def _trl(selection: Selection) -> Convert:
    return lambda row: _pair(_prompt(row, row["chosen"]), row, selection)


@register(
    "TRL, implicit prompt",
    "comparison",
    "chosen rejected",
    lambda row: isinstance(row["chosen"], list),
    unless="prompt",
    carries=_CARRIES,
    scores=_SCORES,
)
def _trl_implicit(selection: Selection) -> Convert:
    return lambda row: _pair(messages("chosen", row["chosen"])[:-1], row, selection)


@register("TRL prompt and completion", "dialogue", "prompt completion")
@stateless
def _completion(row: Row) -> Iterator[Row]:
    prompt = _prompt(row, None)
    yield {"messages": [*prompt, assistant(answer(prompt, "completion", row["completion"]))]}


@register(
    "UltraFeedback binarized",
    "prompt",
    "prompt messages",
    lambda row: finished(row["messages"]),
    unless="",
    carries=f"{_CARRIES} chosen rejected",
)
@stateless
def _binarized(row: Row) -> Iterator[Row]:
    yield {"messages": _prompt(row, row["messages"])}


@register(
    "TRL prompt only",
    "prompt",
    "prompt",
    reads=lambda row: ["chosen"] if isinstance(row.get("chosen"), list) else [],
    carries=f"{_CARRIES} chosen rejected completion",
)
@stateless
def _prompt_only(row: Row) -> Iterator[Row]:
    yield {"messages": _prompt(row, row.get("chosen"))}
