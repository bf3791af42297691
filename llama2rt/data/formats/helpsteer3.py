"""HelpSteer3's preferences (NVIDIA): two answers, compared by three people or more.

A row holds `domain`, `language`, `context` (messages), `response1`, `response2`,
`overall_preference` and `individual_preference`, an object a person of `score`, `reasoning`,
`feedback1` and `feedback2`. Scores are whole numbers from -3 (response 1 is much better) over 0
(about the same) to 3 (response 2 is much better; card of nvidia/HelpSteer3). The overall preference
decides here; `consensus` in a source's table lets the majority of the votes decide.
"""

from collections.abc import Iterator
from typing import Any

from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import item, messages, text
from llama2rt.data.json_values import shown, type_name
from llama2rt.errors import InputError

# By how far a score is from 0.
_RATINGS = (None, "slightly_better", "better", "significantly_better")


def _score(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(-3, 4):
        raise InputError(f"{key}: expected a whole number from -3 to 3, got {shown(value)}")
    return int(value)


def _votes(individual: Any, overall: int) -> list[Row]:
    if not isinstance(individual, list):
        raise InputError(f"individual_preference: expected a list, got {type_name(individual)}")
    votes = []
    for number, judgement in enumerate(individual, start=1):
        where = f"individual_preference: item {number}"
        value = _score(f"{where} score", item(where, judgement, "score")["score"])
        agrees = "chosen" if value * overall > 0 else "rejected"
        rated = {"prefers": agrees, "rating": _RATINGS[abs(value)]}
        votes.append(rated if value else {"prefers": "neither"})
    return votes


@register(
    "HelpSteer3",
    "comparison",
    "context response1 response2 overall_preference",
    reads="individual_preference",
    carries="domain language",
)
@selecting
def _helpsteer3(row: Row, selection: Selection) -> Iterator[Row]:
    """One comparison with its votes; none of a pair that is about the same."""
    prompt = messages("context", row["context"])
    answers = [text(row, "response1"), text(row, "response2")]
    overall = _score("overall_preference", row["overall_preference"])
    if overall == 0:
        selection.left_out["pairs called a tie"] += 1
        return
    votes = _votes(row.get("individual_preference", []), overall)
    best = int(overall > 0)
    record = {"prompt": prompt, "chosen": answers[best], "rejected": answers[1 - best]}
    yield record | {"rating": _RATINGS[abs(overall)], "votes": votes, "source": "helpsteer3"}
