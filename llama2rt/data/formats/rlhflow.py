"""Prompt collections of the RLHF Workflow project: the conversation under `context_messages`."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, register, stateless
from llama2rt.data.formats.values import messages


@register("RLHFlow prompts", "prompt", "context_messages", carries="context")
@stateless
def _context_messages(row: Row) -> Iterator[Row]:
    yield {"messages": messages("context_messages", row["context_messages"])}
