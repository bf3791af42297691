"""Anthropic's HH-RLHF: two transcripts that differ in their last turn."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, register, stateless
from llama2rt.data.formats.values import is_transcript, text, transcript
from llama2rt.errors import InputError


def _is_pair(row: Row) -> bool:
    sides = [is_transcript(row["chosen"]), is_transcript(row["rejected"])]
    # Beside a prompt of messages a single transcript is what a policy wrote, in our own form.
    return all(sides) if isinstance(row.get("prompt"), list) else any(sides)


@register("Anthropic HH transcripts", "comparison", "chosen rejected", _is_pair, unless="")
@stateless
def _hh(row: Row) -> Iterator[Row]:
    sides = {}
    for side in ("chosen", "rejected"):
        messages = transcript(side, text(row, side))
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{side}: the transcript must end with an 'Assistant:' turn")
        sides[side] = messages
    if sides["chosen"][:-1] != sides["rejected"][:-1]:
        raise InputError("chosen and rejected have different contexts")
    yield {
        "prompt": sides["chosen"][:-1],
        "chosen": sides["chosen"][-1]["content"],
        "rejected": sides["rejected"][-1]["content"],
        "source": "hh",
    }
