"""PKU-SafeRLHF: every pair of answers judged twice, by helpfulness and by safety."""

from collections.abc import Iterator

from llama2rt.data.formats.registry import Row, Selection, register, selecting
from llama2rt.data.formats.values import choice, conversation, text
from llama2rt.data.json_values import type_name
from llama2rt.errors import InputError


@register(
    "PKU-SafeRLHF",
    "comparison",
    "prompt response_0 response_1 better_response_id safer_response_id",
    reads="is_response_0_safe is_response_1_safe",
    carries="prompt_source response_0_source response_1_source response_0_harm_category "
    "response_1_harm_category response_0_severity_level response_1_severity_level "
    "response_0_sha256 response_1_sha256",
    decides="kind safety",
)
@selecting
def _saferlhf(row: Row, selection: Selection) -> Iterator[Row]:
    """Two comparisons, one by helpfulness and one by safety; the latter labelled, and left out
    where the chosen answer is unsafe and the other safe (section 3.2.1 of Llama 2)."""
    answers = [text(row, "response_0"), text(row, "response_1")]
    safe = [_safe(row, key) for key in ("is_response_0_safe", "is_response_1_safe")]
    prompt = conversation(row, "prompt")
    for kind, key in (("helpfulness", "better_response_id"), ("safety", "safer_response_id")):
        best = choice(row, key)
        record = {"prompt": prompt, "kind": kind, "source": "pku-saferlhf"}
        record |= {"chosen": answers[best], "rejected": answers[1 - best]}
        if kind == "safety" and None not in safe:
            if safe[1 - best] and not safe[best]:
                what = "safety pairs that prefer an unsafe answer to a safe one"
                selection.drop("unsafe_chosen", what)
                continue
            record["safety"] = (
                "both_unsafe"
                if not safe[best]
                else "both_safe"
                if safe[1 - best]
                else "chosen_safe"
            )
        yield record


def _safe(row: Row, key: str) -> bool | None:
    value = row.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key}: expected true or false, got {type_name(value)}")
    return value
