"""Summarize-from-feedback (OpenAI): two summaries of a Reddit post or a news article, one chosen.

A row of its comparisons holds `info` (`id`, `title`, and either `post` and `subreddit` or `article`
and `site`), two `summaries` (`text`, `policy`, `note`), `choice` (0 or 1), `worker`, `batch`,
`split` (train, valid1, valid2) and `extra.confidence` (README of openai/summarize-from-feedback;
the Hugging Face copy openai/summarize_from_feedback fills what an `info` lacks with nulls). Some
pairs were judged by several workers. The texts around post and article are those that its policies
were trained with (utils/experiment_helpers.py there). Left out: the axis evaluations, which rate
one summary; `confidence`, whose steps are not those of a rating.
"""

from collections.abc import Iterator
from typing import Any

from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import choice, conversation, item, text
from llama2rt.data.json_values import type_name
from llama2rt.errors import InputError


def _asked(info: Any) -> str:
    if not isinstance(info, dict):
        raise InputError(f"info: expected an object, got {type_name(info)}")
    if ("post" in info) == ("article" in info):
        raise InputError("info: expected a post or an article")
    if "article" in info:
        return f"Article:\n{text(info, 'article').strip()}\n\nTL;DR:"
    head = [f"SUBREDDIT: r/{text(info, 'subreddit')}"] if "subreddit" in info else []
    head += [f"TITLE: {text(info, 'title')}"] if "title" in info else []
    return "\n\n".join([*head, f"POST: {text(info, 'post').strip()}", "TL;DR:"])


@register(
    "Summarize from feedback",
    "comparison",
    "info summaries choice",
    reads="worker",
    carries="batch split extra",
)
@selecting
def _summaries(row: Row, selection: Selection) -> Iterator[Row]:
    """One comparison, with the worker as its rater; none of two summaries of one text."""
    summaries = row["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise InputError("summaries: expected a list of two")
    # They begin with the space that the policies wrote after "TL;DR:".
    texts = [
        text(item(f"summaries: item {number}", summary, "text"), "text").strip()
        for number, summary in enumerate(summaries, start=1)
    ]
    best = choice(row, "choice")
    prompt = conversation({"info": _asked(row["info"])}, "info")
    rater = text(row, "worker") if "worker" in row else ""
    if texts[0] == texts[1]:
        selection.drop("identical_responses", "pairs of one text")
        return
    record = {"prompt": prompt, "chosen": texts[best], "rejected": texts[1 - best]}
    yield record | {"rater": rater, "source": "summarize-from-feedback"}
