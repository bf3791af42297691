"""Several answers to a prompt with scores: UltraFeedback and HelpSteer."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from llama2rt.data.formats.pairs import Scored, ranked, require_few
from llama2rt.data.formats.registry import Convert, Row, Selection, register, selecting
from llama2rt.data.formats.values import bare_text, conversation, score, text
from llama2rt.errors import InputError


@register(
    "UltraFeedback",
    "comparison",
    "instruction completions",
    carries="models correct_answers incorrect_answers",
    scores="",
)
@selecting
def _ultrafeedback(row: Row, selection: Selection) -> Iterator[Row]:
    """All pairs of the four answers, ranked by their mean fine-grained score; an answer that an
    annotator left unrated ("N/A") is left out, and so is a blank one."""
    completions = row["completions"]
    if not isinstance(completions, list):
        raise InputError("completions: expected a list")
    require_few("completions", completions)
    aspects = {aspect for completion in completions for aspect in _annotations(completion)}
    answers = []
    for number, completion in enumerate(completions, start=1):
        where = f"completions: item {number}"
        if not isinstance(completion, dict):
            raise InputError(f"{where} is no object")
        if not selection.says_something(completion.get("response")):
            continue
        value = _mean_rating(where, completion, aspects)
        if value is None:
            selection.left_out["answers without a rating"] += 1
        elif "response" not in completion:
            raise InputError(f"{where} has no response")
        else:
            answers.append((bare_text(completion, "response"), value))
    yield from ranked(conversation(row, "instruction"), answers, "ultrafeedback", selection)


def _annotations(completion: Any) -> dict[str, Any]:
    found = completion.get("annotations") if isinstance(completion, dict) else None
    return found if isinstance(found, dict) else {}


def _mean_rating(where: str, completion: dict[str, Any], aspects: set[str]) -> float | None:
    """The fine-grained score, or the mean over all `aspects`; None where one is unrated."""
    if "fine-grained_score" in completion:
        return score(f"{where} fine-grained_score", completion["fine-grained_score"])
    annotations = _annotations(completion)
    if not annotations or not all(isinstance(value, dict) for value in annotations.values()):
        raise InputError(f"{where} has no scores")
    ratings = [annotations.get(aspect, {}).get("Rating", "N/A") for aspect in sorted(aspects)]
    if "N/A" in ratings:
        return None
    return sum(score(f"{where} Rating", rating) for rating in ratings) / len(ratings)


@register(
    "HelpSteer",
    "comparison",
    "prompt response helpfulness correctness",
    carries="coherence complexity verbosity",
    scores="",
)
def _helpsteer(selection: Selection) -> Convert:
    """A row is an answer; it is paired with the earlier ones to its prompt, ranked by helpfulness
    plus correctness (0-4 each). They follow each other as published, but not in a shuffled file."""
    earlier: defaultdict[str, list[Scored]] = defaultdict(list)

    def convert(row: Row) -> Iterator[Row]:
        prompt = conversation(row, "prompt")
        value = sum(score(key, row[key]) for key in ("helpfulness", "correctness"))
        if not selection.says_something(row["response"]):
            return
        new = (text(row, "response"), value)
        answers = earlier[row["prompt"]]
        require_few("response", [*answers, new])
        for other in answers:
            yield from ranked(prompt, [other, new], "helpsteer", selection)
        answers.append(new)

    return convert
