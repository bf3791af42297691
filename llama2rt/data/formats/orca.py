"""Orca's questions with a system prompt, as pairs: the original and Distilabel's."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, Selection, Start, register, selecting
from llama2rt.data.formats.values import conversation, text

_CARRIES = (
    "rating generations order labelling_model labelling_prompt raw_labelling_response rationale "
    "original_chosen original_rejected chosen_score in_gsm8k_train"
)


def _orca(question: str) -> Start:
    @selecting
    def convert(row: Row, selection: Selection) -> Iterator[Row]:
        """Pairs that the labelling model called a tie are left out."""
        if row.get("status") == "tie":
            selection.left_out["pairs called a tie"] += 1
            return
        system = text(row, "system") if "system" in row else ""
        prompt = [{"role": "system", "content": system}] if system.strip() else []
        sides = {side: text(row, side) for side in ("chosen", "rejected")}
        yield {"prompt": prompt + conversation(row, question), **sides, "source": "orca"}

    return convert


for _name, _question in (("Orca pairs", "question"), ("Distilabel-Orca", "input")):
    register(
        _name,
        "comparison",
        f"{_question} chosen rejected",
        unless="messages prompt",
        reads="system status",
        carries=_CARRIES,
    )(_orca(_question))
