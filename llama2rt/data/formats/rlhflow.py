"""Prompt collections of the RLHF Workflow project: the conversation under `context_messages`.

A row holds `context_messages`, `context` (the same laid out by a chat template, or its text),
`dataset` and `id` (card of RLHFlow/prompt-collection-v0.1). The project's standard form of
preferences, two conversations `chosen` and `rejected` that share all but the last turn, with or
without `chosen_score` and `rejected_score` (README of RLHFlow/RLHF-Reward-Modeling), is TRL's with
an implicit prompt, and read as such.
"""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, register, stateless
from llama2rt.data.formats.values import messages


@register("RLHFlow prompts", "prompt", "context_messages", carries="context dataset")
@stateless
def _context_messages(row: Row) -> Iterator[Row]:
    yield {"messages": messages("context_messages", row["context_messages"])}
