"""ShareGPT: `conversations` of `{"from": ..., "value": ...}`."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, register, stateless
from llama2rt.data.formats.values import messages


@register("ShareGPT conversations", "dialogue", "conversations", carries="id")
@stateless
def _sharegpt(row: Row) -> Iterator[Row]:
    yield {"messages": messages("conversations", row["conversations"], finished=True)}
