"""Rows as other people publish them, turned into our records.

Each format is a test on a row's keys and a function from the row to JSON objects in our own form,
which ``records`` then checks like any other. A row may give several records (four ranked answers)
or none where the source's own rule leaves it out (an SHP pair with too small a score ratio). Extra
keys of a foreign row are ignored. Selection rules: Dong et al. 2024 (arXiv 2405.07863), section 2;
what they drop as malformed is an error here, to be tolerated by ``skip_invalid``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from llama2rt.errors import InputError

Row = dict[str, Any]
Convert = Callable[[Row], Iterator[Row]]


@dataclass(frozen=True)
class Format:
    """``kind`` of record it gives; ``keys`` that a row must have, and what else must hold of it;
    ``start`` makes a fresh converter for one file (some remember earlier rows)."""

    name: str
    kind: str
    keys: frozenset[str]
    matches: Callable[[Row], bool]
    start: Callable[[], Convert]


FORMATS: list[Format] = []


def _register(
    name: str,
    kind: str,
    keys: str,
    matches: Callable[[Row], bool] = lambda row: "messages" not in row,
) -> Callable[[Callable[[], Convert]], Callable[[], Convert]]:
    def add(start: Callable[[], Convert]) -> Callable[[], Convert]:
        FORMATS.append(Format(name, kind, frozenset(keys.split()), matches, start))
        return start

    return add


def _stateless(convert: Convert) -> Callable[[], Convert]:
    return lambda: convert


def recognise(row: Row, kind: str) -> Format | None:
    """The first foreign format of ``kind`` that ``row`` is in."""
    for candidate in FORMATS:
        if candidate.kind == kind and candidate.keys <= row.keys() and candidate.matches(row):
            return candidate
    return None


def _user(text: Any) -> list[Row]:
    return [{"role": "user", "content": text}]


def _messages(value: Any) -> Any:
    """A message list with ShareGPT's from/value spelt as role/content; plain text as a user's."""
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
    if isinstance(value, str):
        return _user(value)
    if not isinstance(value, list):
        return value
    return [
        {"role": roles.get(str(m["from"]), m["from"]), "content": m["value"]}
        if isinstance(m, dict) and {"from", "value"} <= m.keys()
        else {k: v for k, v in m.items() if k in ("role", "content") or v is not None}
        if isinstance(m, dict)
        else m
        for m in value
    ]


def _answer(prompt: Any, side: str, value: Any) -> Any:
    """The answer's text: the value itself, or the last of its messages when those before it repeat
    the prompt or are absent."""
    if not isinstance(value, list):
        return value
    value = _messages(value)
    if not value or not isinstance(value[-1], dict) or value[-1].get("role") != "assistant":
        raise InputError(f"{side}: the last message must be the assistant's")
    if len(value) > 1 and value[:-1] != prompt:
        raise InputError(f"{side}: its context differs from the prompt")
    return value[-1].get("content")


# Transcripts come before plain text: their rows have the same keys.
_TURN = re.compile(r"\n\n(Human|Assistant):")


def _transcript(side: str, text: str) -> list[Row]:
    start, *parts = _TURN.split(text)
    if start.strip() or not parts:
        raise InputError(f"{side}: a transcript must begin with a 'Human:' turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _is_transcript(row: Row) -> bool:
    return any(
        isinstance(row[side], str) and _TURN.match(row[side]) for side in ("chosen", "rejected")
    )


@_register("Anthropic HH transcripts", "comparison", "chosen rejected", _is_transcript)
@_stateless
def _hh(row: Row) -> Iterator[Row]:
    sides = {}
    for side in ("chosen", "rejected"):
        if not isinstance(row[side], str):
            raise InputError(f"{side}: expected text")
        messages = _transcript(side, row[side])
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


def _is_trl(row: Row) -> bool:
    return isinstance(row["prompt"], str) or isinstance(row["chosen"], list)


@_register("TRL, explicit prompt", "comparison", "prompt chosen rejected", _is_trl)
@_stateless
def _trl(row: Row) -> Iterator[Row]:
    """Beside answers of several turns (Capybara, UltraFeedback binarized) a prompt of plain text
    repeats one of those turns: the answers' common context is the prompt then."""
    prompt = _messages(row["prompt"])
    if isinstance(row["prompt"], str) and isinstance(row["chosen"], list) and row["chosen"][2:]:
        prompt = _messages(row["chosen"])[:-1]
    sides = {side: _answer(prompt, side, row[side]) for side in ("chosen", "rejected")}
    yield {"prompt": prompt, **sides}


@_register(
    "TRL, implicit prompt",
    "comparison",
    "chosen rejected",
    lambda row: isinstance(row["chosen"], list) and "prompt" not in row,
)
@_stateless
def _trl_implicit(row: Row) -> Iterator[Row]:
    prompt = _messages(row["chosen"])[:-1]
    sides = {side: _answer(prompt, side, row[side]) for side in ("chosen", "rejected")}
    yield {"prompt": prompt, **sides}


@_register("UltraInteract", "comparison", "trajectory chosen rejected")
@_stateless
def _ultrainteract(row: Row) -> Iterator[Row]:
    """Correct against incorrect nodes of a preference tree; the trajectory leads to both."""
    sides = {side: row[side] for side in ("chosen", "rejected")}
    yield {"prompt": _messages(row["trajectory"]), **sides, "source": "ultrainteract"}


def _orca(question: str) -> Convert:
    def convert(row: Row) -> Iterator[Row]:
        """Pairs that the labelling model called a tie are left out."""
        if row.get("status") == "tie":
            return
        system = [{"role": "system", "content": row["system"]}] if row["system"] else []
        sides = {side: row[side] for side in ("chosen", "rejected")}
        yield {"prompt": system + _user(row[question]), **sides, "source": "orca"}

    return convert


_register("Orca pairs", "comparison", "system question chosen rejected")(lambda: _orca("question"))
_register("Distilabel-Orca", "comparison", "system input chosen rejected")(lambda: _orca("input"))


@_register("ShareGPT conversations", "dialogue", "conversations")
@_stateless
def _sharegpt(row: Row) -> Iterator[Row]:
    yield {"messages": _messages(row["conversations"])}


@_register("TRL prompt and completion", "dialogue", "prompt completion")
@_stateless
def _completion(row: Row) -> Iterator[Row]:
    prompt = _messages(row["prompt"])
    if not isinstance(prompt, list):
        raise InputError("prompt: expected text or a list of messages")
    answer = _answer(prompt, "completion", row["completion"])
    yield {"messages": [*prompt, {"role": "assistant", "content": answer}]}


@_register("GSM8K", "dialogue", "question answer")
@_stateless
def _gsm8k(row: Row) -> Iterator[Row]:
    answer = {"role": "assistant", "content": row["answer"]}
    yield {"messages": [*_user(row["question"]), answer], "source": "gsm8k"}


@_register("TRL prompt only", "prompt", "prompt")
@_stateless
def _prompt_only(row: Row) -> Iterator[Row]:
    yield {"messages": _messages(row["prompt"])}


@_register("GSM8K questions", "prompt", "question answer")
@_stateless
def _gsm8k_prompt(row: Row) -> Iterator[Row]:
    yield {"messages": _user(row["question"])}


def _has_solutions(row: Row) -> bool:
    return any(isinstance(value, dict) and "is_correct" in value for value in row.values())


@_register("GSM8K model solutions", "comparison", "question ground_truth", _has_solutions)
@_stateless
def _gsm8k_solutions(row: Row) -> Iterator[Row]:
    """Every correct solution against every incorrect one; none where all are alike."""
    by_truth: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for name, value in row.items():
        if isinstance(value, dict) and "is_correct" in value:
            if not isinstance(value["is_correct"], bool) or not isinstance(
                value.get("solution"), str
            ):
                raise InputError(f"{name}: expected is_correct true or false, and solution text")
            by_truth[value["is_correct"]][value["solution"]] = None
    for chosen in by_truth[True]:
        for rejected in by_truth[False]:
            yield {
                "prompt": _user(row["question"]),
                "chosen": chosen,
                "rejected": rejected,
                "source": "gsm8k_model_solutions",
            }


def _ranked(prompt: Any, answers: list[tuple[Any, float]], source: str) -> Iterator[Row]:
    """A comparison for each two answers whose scores differ."""
    for (a, score_a), (b, score_b) in combinations(answers, 2):
        if score_a != score_b and a != b:
            chosen, rejected = (a, b) if score_a > score_b else (b, a)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}


def _score(key: str, value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{key}: expected a number, got {value!r}") from None
    except OverflowError:
        raise InputError(f"{key}: a number too large to hold") from None
    if not math.isfinite(score):  # it would rank as neither above nor below another
        raise InputError(f"{key}: expected a finite number, got {value!r}")
    return score


@_register("UltraFeedback", "comparison", "instruction completions")
@_stateless
def _ultrafeedback(row: Row) -> Iterator[Row]:
    """All pairs of the four answers, ranked by their mean fine-grained score; an answer that an
    annotator left unrated ("N/A") is left out."""
    if not isinstance(row["completions"], list):
        raise InputError("completions: expected a list")
    answers = []
    for number, completion in enumerate(row["completions"], start=1):
        if not isinstance(completion, dict):
            raise InputError(f"completions: item {number} is no object")
        score = completion.get("fine-grained_score")
        if score is None:
            try:
                ratings = [value["Rating"] for value in completion["annotations"].values()]
            except (KeyError, TypeError, AttributeError):
                raise InputError(f"completions: item {number} has no scores") from None
            if "N/A" in ratings or not ratings:
                continue
            score = sum(_score("Rating", rating) for rating in ratings) / len(ratings)
        answers.append((completion.get("response"), _score("fine-grained_score", score)))
    yield from _ranked(_user(row["instruction"]), answers, "ultrafeedback")


@_register("HelpSteer", "comparison", "prompt response helpfulness correctness")
def _helpsteer() -> Convert:
    """Rows of one prompt follow each other; each is paired with those before it, ranked by
    helpfulness plus correctness (0-4 each)."""
    prompt: Any = None
    answers: list[tuple[Any, float]] = []

    def convert(row: Row) -> Iterator[Row]:
        nonlocal prompt, answers
        if row["prompt"] != prompt:
            prompt, answers = row["prompt"], []
        score = sum(_score(key, row[key]) for key in ("helpfulness", "correctness"))
        for earlier in answers:
            yield from _ranked(_user(prompt), [earlier, (row["response"], score)], "helpsteer")
        answers.append((row["response"], score))

    return convert


@_register("SHP", "comparison", "post_id history human_ref_A human_ref_B labels score_ratio")
def _shp() -> Convert:
    """Pairs with a score ratio above 2, at most five a post."""
    taken: defaultdict[Any, int] = defaultdict(int)

    def convert(row: Row) -> Iterator[Row]:
        if not isinstance(row["post_id"], str):
            raise InputError(f"post_id: expected text, got {row['post_id']!r}")
        if row["labels"] not in (0, 1):
            raise InputError(f"labels: expected 0 or 1, got {row['labels']!r}")
        if _score("score_ratio", row["score_ratio"]) <= 2 or taken[row["post_id"]] >= 5:
            return
        taken[row["post_id"]] += 1
        a, b = row["human_ref_A"], row["human_ref_B"]
        chosen, rejected = (a, b) if row["labels"] else (b, a)
        prompt = _user(row["history"])
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "shp"}

    return convert


@_register(
    "PKU-SafeRLHF",
    "comparison",
    "prompt response_0 response_1 better_response_id safer_response_id",
)
@_stateless
def _saferlhf(row: Row) -> Iterator[Row]:
    """Two comparisons, one by helpfulness and one by safety; the latter labelled, and left out
    where the chosen answer is unsafe and the other safe (section 3.2.1 of Llama 2)."""
    answers = [row["response_0"], row["response_1"]]
    safe = [row.get("is_response_0_safe"), row.get("is_response_1_safe")]
    for kind, key in (("helpfulness", "better_response_id"), ("safety", "safer_response_id")):
        best = row[key]
        if best not in (0, 1):
            raise InputError(f"{key}: expected 0 or 1, got {best!r}")
        record = {"prompt": _user(row["prompt"]), "kind": kind, "source": "pku-saferlhf"}
        record |= {"chosen": answers[best], "rejected": answers[1 - best]}
        if kind == "safety" and None not in safe:
            if safe[1 - best] and not safe[best]:
                continue
            record["safety"] = (
                "both_unsafe"
                if not safe[best]
                else "both_safe"
                if safe[1 - best]
                else "chosen_safe"
            )
        yield record
