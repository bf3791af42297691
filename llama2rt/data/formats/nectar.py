"""Nectar (Berkeley): seven answers to a prompt, ranked by GPT-4.

A row holds `prompt`, a transcript in Anthropic's form that ends with an empty turn of the
assistant, `answers` (each of `answer`, `model` and `rank`, 1 for the best), `turns`,
`num_responses`, `source` (a list of names) and `good_natured` (card of berkeley-nest/Nectar, which
calls the count `num_response` and ranks integers; the file has `num_responses` and floats). All
pairs are made, as for the reward model that was trained on it: 3.8 million of 183,000 prompts.
"""

from collections.abc import Iterator

from llama2rt.data.formats.pairs import ranked, require_few
from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import bare_text, conversation, item, score
from llama2rt.errors import InputError


def _is_ranked(row: Row) -> bool:
    answers = row["answers"]
    return isinstance(answers, list) and any(
        isinstance(answer, dict) and "rank" in answer for answer in answers
    )


@register(
    "Nectar",
    "comparison",
    "prompt answers",
    _is_ranked,
    carries="turns num_responses num_response source good_natured",
    scores="",
)
@selecting
def _nectar(row: Row, selection: Selection) -> Iterator[Row]:
    """Each two answers of different rank; `minimum_score_difference` counts ranks."""
    prompt = conversation(row, "prompt")
    require_few("answers", row["answers"])
    answers = []
    for number, answer in enumerate(row["answers"], start=1):
        where = f"answers: item {number}"
        item(where, answer, "answer", "rank")
        rank = score(f"{where} rank", answer["rank"])
        if rank < 1:
            raise InputError(f"{where} rank: expected at least 1, got {rank:g}")
        if selection.says_something(answer["answer"]):
            answers.append((bare_text(answer, "answer"), -rank))
    yield from ranked(prompt, answers, "nectar", selection)
