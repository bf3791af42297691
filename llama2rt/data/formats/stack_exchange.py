"""Stack Exchange preferences (Hugging Face H4): a question with its answers, scored by votes.

A row holds `qid`, `question`, `date`, `metadata` (addresses and the licence) and `answers`, each of
`text`, `pm_score`, `selected` (by who asked), `answer_id`, `author`, `author_id` and
`author_profile`. `pm_score` is round(log2(1 + upvotes)), plus 1 where the answer was selected, and
-1 below zero upvotes (card of HuggingFaceH4/stack-exchange-preferences, after Askell et al. 2021,
arXiv 2112.00861); many answers to a question have the same. Some questions have hundreds of
answers: the first ten pairs are taken of each, the number of the StackLLaMA recipe.
"""

from collections.abc import Iterator
from itertools import islice

from llama2rt.data.formats.pairs import holding, ranked, require_few, with_scores
from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import conversation

MOST_PAIRS = 10
MOST_ANSWERS = 1000


@register(
    "Stack Exchange preferences",
    "comparison",
    "question answers",
    holding("answers", "pm_score"),
    carries="qid date metadata",
    scores="",
)
@selecting
def _stack_exchange(row: Row, selection: Selection) -> Iterator[Row]:
    """Ten pairs at most, in the order of the answers."""
    prompt = conversation(row, "question")
    require_few("answers", row["answers"], MOST_ANSWERS)
    answers = with_scores("answers", row["answers"], "text", "pm_score", selection)
    pairs = ranked(prompt, answers, "stack-exchange", selection)
    yield from islice(pairs, MOST_PAIRS)
    if next(pairs, None) is not None:
        selection.left_out["further pairs of questions with ten already, from each"] += 1
