"""Nectar (Berkeley): seven answers to a prompt, ranked by GPT-4.

A row holds `prompt`, a transcript in Anthropic's form that ends with an empty turn of the
assistant, `answers` (each of `answer`, `model` and `rank`, 1 for the best), `turns`,
`num_responses`, `source` (a list of names) and `good_natured` (card of berkeley-nest/Nectar, which
calls the count `num_response` and ranks integers; the file has `num_responses` and floats). All
pairs are made, as for the reward model that was trained on it: 3.8 million of 183,000 prompts.
"""

from collections.abc import Iterator

from llama2rt.data.formats.pairs import holding, ranked, require_few, with_scores
from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import conversation
from llama2rt.errors import InputError


@register(
    "Nectar",
    "comparison",
    "prompt answers",
    holding("answers", "rank"),
    carries="turns num_responses num_response source good_natured",
    scores="",
)
@selecting
def _nectar(row: Row, selection: Selection) -> Iterator[Row]:
    """Each two answers of different rank; `minimum_score_difference` counts ranks."""
    prompt = conversation(row, "prompt")
    require_few("answers", row["answers"])
    answers = with_scores("answers", row["answers"], "answer", "rank", selection)
    if any(rank < 1 for _, rank in answers):
        raise InputError("answers: a rank below 1")
    best_highest = [(answer, -rank) for answer, rank in answers]
    yield from ranked(prompt, best_highest, "nectar", selection)
