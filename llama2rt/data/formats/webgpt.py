"""WebGPT comparisons (OpenAI): two answers to a question, written with quotes from web pages.

A row holds `question` (an object of `dataset`, `id` and `full_text`) and, for either answer, its
`answer_N`, the `quotes_N` it was written from (`title`, `extract`: lists), `tokens_N` (`prefix`,
`completion`: lists of GPT-2's) and `score_N`, from -1 to 1, which sum to 0; 0 and 0 is a tie (card
of openai/webgpt_comparisons). Left out: the quotes, since each answer has its own and a comparison
has one prompt; the marks that refer to them, such as [1], stay in the answers.
"""

from collections.abc import Iterator

from llama2rt.data.formats.pairs import ranked
from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import bare_text, conversation, item, score
from llama2rt.errors import InputError


@register(
    "WebGPT comparisons",
    "comparison",
    "question answer_0 answer_1 score_0 score_1",
    carries="quotes_0 quotes_1 tokens_0 tokens_1",
    scores="",
)
@selecting
def _webgpt(row: Row, selection: Selection) -> Iterator[Row]:
    """One comparison; none of a tie, of a blank answer, or of two of one text."""
    asked = item("question", row["question"], "full_text")
    prompt = conversation({"question": asked["full_text"]}, "question")
    scores = [score(key, row[key]) for key in ("score_0", "score_1")]
    if abs(sum(scores)) > 1e-3:
        raise InputError(f"score_0 and score_1: expected a sum of 0, got {sum(scores):g}")
    answers = [(bare_text(row, f"answer_{n}"), scores[n]) for n in (0, 1)]
    said = [answer for answer in answers if selection.says_something(answer[0])]
    yield from ranked(prompt, said, "webgpt", selection)
