"""Orca's questions with a system prompt, as pairs: the original and Distilabel's."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Convert, Row, Selection, register
from llama2rt.data.formats.values import text, user

_CARRIES = (
    "rating generations order labelling_model labelling_prompt raw_labelling_response rationale "
    "original_chosen original_rejected chosen_score in_gsm8k_train"
)


def _orca(question: str) -> Convert:
    def convert(row: Row) -> Iterator[Row]:
        """Pairs that the labelling model called a tie are left out."""
        if row.get("status") == "tie":
            return
        system = text(row, "system") if "system" in row else ""
        prompt = [{"role": "system", "content": system}] if system.strip() else []
        sides = {side: text(row, side) for side in ("chosen", "rejected")}
        yield {"prompt": prompt + user(text(row, question)), **sides, "source": "orca"}

    return convert


def _no_prompt(row: Row) -> bool:
    return not {"messages", "prompt"} & row.keys()


for _name, _question in (("Orca pairs", "question"), ("Distilabel-Orca", "input")):

    @register(
        _name,
        "comparison",
        f"{_question} chosen rejected",
        _no_prompt,
        reads="system status",
        carries=_CARRIES,
    )
    def _start(_selection: Selection, question: str = _question) -> Convert:
        return _orca(question)
