"""Several answers to a prompt with scores: UltraFeedback and HelpSteer."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from llama2rt.data.formats.registry import Convert, Row, Selection, register
from llama2rt.data.formats.values import score, text, user
from llama2rt.errors import InputError

_Scored = tuple[str, float]


def _ranked(
    prompt: str, answers: list[_Scored], source: str, selection: Selection
) -> Iterator[Row]:
    """A comparison for each two answers whose scores differ, and differ enough."""
    for (a, score_a), (b, score_b) in combinations(answers, 2):
        if a.strip() == b.strip() or score_a == score_b:
            continue
        if selection.far_enough(abs(score_a - score_b)):
            chosen, rejected = (a, b) if score_a > score_b else (b, a)
            yield {
                "prompt": user(prompt),
                "chosen": chosen,
                "rejected": rejected,
                "source": source,
            }


@register(
    "UltraFeedback",
    "comparison",
    "instruction completions",
    carries="models correct_answers incorrect_answers",
    scores="",
)
def _ultrafeedback(selection: Selection) -> Convert:
    def convert(row: Row) -> Iterator[Row]:
        """All pairs of the four answers, ranked by their mean fine-grained score; an answer that an
        annotator left unrated ("N/A") is left out, and so is a blank one."""
        if not isinstance(row["completions"], list):
            raise InputError("completions: expected a list")
        answers = []
        for number, completion in enumerate(row["completions"], start=1):
            where = f"completions: item {number}"
            if not isinstance(completion, dict):
                raise InputError(f"{where} is no object")
            if not selection.says_something(completion.get("response")):
                continue
            value = _mean_rating(where, completion)
            if value is None:
                selection.left_out["answers without a rating"] += 1
            elif "response" not in completion:
                raise InputError(f"{where} has no response")
            else:
                answers.append((text(completion, "response"), value))
        yield from _ranked(text(row, "instruction"), answers, "ultrafeedback", selection)

    return convert


def _mean_rating(where: str, completion: dict[str, Any]) -> float | None:
    """The fine-grained score, or the mean over the aspects; None where one is unrated."""
    if "fine-grained_score" in completion:
        return score(f"{where} fine-grained_score", completion["fine-grained_score"])
    try:
        ratings = [value["Rating"] for value in completion["annotations"].values()]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{where} has no scores") from None
    if "N/A" in ratings or not ratings:
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
    """Rows of one prompt follow each other; each is paired with those before it, ranked by
    helpfulness plus correctness (0-4 each)."""
    prompt: str | None = None
    answers: list[_Scored] = []

    def convert(row: Row) -> Iterator[Row]:
        nonlocal prompt, answers
        asked = text(row, "prompt")
        if asked != prompt:
            prompt, answers = asked, []
        value = sum(score(key, row[key]) for key in ("helpfulness", "correctness"))
        if not selection.says_something(row["response"]):
            return
        new = (text(row, "response"), value)
        for earlier in answers:
            yield from _ranked(asked, [earlier, new], "helpsteer", selection)
        answers.append(new)

    return convert
