"""GSM8K: questions with solutions, and model solutions marked right or wrong."""

from collections.abc import Iterator

from llama2rt.data.formats.pairs import require_few
from llama2rt.data.formats.registry import Row, Selection, register, selecting, stateless
from llama2rt.data.formats.values import assistant, conversation, text
from llama2rt.data.json_values import type_name
from llama2rt.errors import InputError


@register("GSM8K", "dialogue", "question answer")
@stateless
def _gsm8k(row: Row) -> Iterator[Row]:
    messages = [*conversation(row, "question"), assistant(text(row, "answer"))]
    yield {"messages": messages, "source": "gsm8k"}


@register(
    "GSM8K questions",
    "prompt",
    "question",
    lambda row: "answer" in row,
    unless="",
    carries="answer",
)
@stateless
def _gsm8k_prompt(row: Row) -> Iterator[Row]:
    yield {"messages": conversation(row, "question")}


def _solutions(row: Row) -> list[str]:
    return [
        name for name, value in row.items() if isinstance(value, dict) and "is_correct" in value
    ]


@register(
    "GSM8K model solutions",
    "comparison",
    "question ground_truth",
    lambda row: bool(_solutions(row)),
    unless="",
    reads=_solutions,
)
@selecting
def _gsm8k_solutions(row: Row, selection: Selection) -> Iterator[Row]:
    """Every correct solution against every incorrect one; none where all are alike."""
    by_truth: dict[bool, dict[str, str]] = {True: {}, False: {}}  # stripped -> as written
    names = _solutions(row)
    require_few("solutions", names)
    for name in names:
        correct, solution = row[name]["is_correct"], row[name].get("solution")
        if not isinstance(correct, bool) or not isinstance(solution, str):
            raise InputError(
                f"{name}: expected is_correct true or false and a solution as text, got "
                f"{type_name(correct)} and {type_name(solution)}"
            )
        if selection.says_something(solution):
            by_truth[correct].setdefault(solution.strip(), solution)
    prompt = conversation(row, "question")
    for right, chosen in by_truth[True].items():
        for wrong, rejected in by_truth[False].items():
            if right == wrong:
                selection.drop("identical_responses", "pairs of one text")
                continue
            yield {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "source": "gsm8k_model_solutions",
            }
