"""UltraInteract: pairs of nodes of a preference tree."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, register, stateless
from llama2rt.data.formats.values import messages, text


@register(
    "UltraInteract",
    "comparison",
    "trajectory chosen rejected",
    carries="task dataset id parent_id",
)
@stateless
def _ultrainteract(row: Row) -> Iterator[Row]:
    """Correct against incorrect nodes; the trajectory leads to both."""
    sides = {side: text(row, side) for side in ("chosen", "rejected")}
    yield {"prompt": messages("trajectory", row["trajectory"]), **sides, "source": "ultrainteract"}
