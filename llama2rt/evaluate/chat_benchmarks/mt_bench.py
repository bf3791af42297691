"""MT-Bench's files (FastChat's llm_judge, `fschat` 0.2.36): 80 questions of two turns, graded from
1 to 10 by a judge that sees one model's answers alone.

question.jsonl, model_answer/MODEL.jsonl, reference_answer/JUDGE.jsonl, judge_prompts.jsonl and
model_judgment/JUDGE_single.jsonl. `mt_bench_pairs` is its pairwise mode.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks.records import (
    Answered,
    Answers,
    Id,
    Question,
    identifier,
    judged_once,
    new,
    objects,
    required,
    text,
    texts,
)
from llama2rt.evaluate.intervals import bootstrap_grouped
from llama2rt.evaluate.judges.cache import Cache, key_of
from llama2rt.evaluate.judges.speakers import Options, Speaker, replies

NEED_REFERENCES = frozenset({"math", "reasoning", "coding"})
"""categories whose judge is shown right answers"""
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""at which each category is answered; 0 for the others"""
TURNS = 2
UNREADABLE = -1
"""the score of a judgement without a grade, which averages leave out"""
LOWEST, HIGHEST = 1, 10
REPLY_TOKENS = 2048
_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_ANSWER_KEYS = ("question_id", "model_id", "choices")
_JUDGED_KEYS = ("question_id", "model", "judge", "score", "turn")
_JUDGED_ABOUT = ("user_prompt", "judgment", "tstamp")


@dataclass(frozen=True)
class Prompt:
    """What the judge is asked of one turn."""

    name: str
    system: str
    user: str
    """with {question} and {answer}, or for the second turn {question_1}, {answer_1}, {question_2}
    and {answer_2}; and {ref_answer_1}, {ref_answer_2} where it is shown right answers"""


_SYSTEM = "You grade the answers of an assistant."
_GRADE = (
    "Say first what is right and what is wrong about {what}: is it correct, helpful and detailed "
    "enough? Its length alone counts for nothing. Then grade it from 1 to 10, 10 for the best, in "
    "double brackets on a line of its own, such as: Grade: [[5]]"
)
_ONE = "Question:\n{question}\n\n{right}Answer:\n{answer}\n\n" + _GRADE
_TWO = (
    "First question:\n{question_1}\n\n{right_1}First answer:\n{answer_1}\n\n"
    "Second question:\n{question_2}\n\n{right_2}Second answer:\n{answer_2}\n\n" + _GRADE
)
_RIGHT = "A right answer, to compare with:\n{ref_answer}\n\n"


def _own(name: str, turns: int, references: bool) -> Prompt:
    """This project's prompt, for those who have not FastChat's file."""
    rights = [_RIGHT.replace("ref_answer", f"ref_answer_{i}") * references for i in (1, 2)]
    whole = _ONE if turns == 1 else _TWO
    whole = whole.replace("{right}", rights[0])
    whole = whole.replace("{right_1}", rights[0]).replace("{right_2}", rights[1])
    whole = whole.replace("{what}", "the answer" if turns == 1 else "the second answer")
    return Prompt(f"llama2rt-{name}", _SYSTEM, whole)


NAMES = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
"""FastChat's names by turn and whether right answers are shown"""
OWN = {key: _own(name, *key) for key, name in NAMES.items()}


def read_questions(path: Path) -> list[Question]:
    """question.jsonl."""
    found, seen = [], dict[Any, str]()
    for where, row in objects(path, ("question_id", "turns"), ("category", "reference")):
        number = identifier(where, "question_id", row["question_id"])
        new(where, "question_id", number, seen)
        turns = texts(where, "turns", row["turns"])
        if len(turns) > TURNS:
            raise InputError(f"{where}: turns: expected one or two, got {len(turns)}")
        reference = texts(where, "reference", row["reference"]) if row.get("reference") else ()
        category = text(where, "category", row.get("category", ""), blank=True)
        found.append(Question(number, turns, category, reference))
    return found


def temperature(question: Question) -> float:
    """At which FastChat has a model answer it."""
    return TEMPERATURES.get(question.category, 0.0)


def read_answers(path: Path) -> Answers:
    """model_answer/MODEL.jsonl; of a question that is answered again the last answer, as there. The
    model's name is the file's."""
    turns: dict[Id, tuple[str, ...]] = {}
    for where, row in objects(path, _ANSWER_KEYS, ("answer_id", "tstamp")):
        number = identifier(where, "question_id", row["question_id"])
        choices = row["choices"]
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise InputError(f"{where}: choices: expected a list of objects with turns")
        turns[number] = texts(where, "choices[0].turns", choices[0].get("turns"))
    return Answers(path.name.removesuffix(".jsonl"), turns)


def write_answers(path: Path, model: str, answered: Sequence[Answered]) -> None:
    """model_answer/MODEL.jsonl."""
    records = [
        {
            "question_id": one.question.id,
            "answer_id": key_of(model, one.question.id, [r.text for r in one.replies])[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": [reply.text for reply in one.replies]}],
            "tstamp": time.time(),
        }
        for one in answered
    ]
    atomic.write(path, "".join(f"{json.dumps(r, ensure_ascii=False)}\n" for r in records))


def read_prompts(
    path: Path, names: Mapping[tuple[int, bool], str] = NAMES, output_format: str = "[[rating]]"
) -> dict[tuple[int, bool], Prompt]:
    """FastChat's judge_prompts.jsonl: of its prompts four, by default those that grade one model.
    InputError where one of them is not there, or asks for another form of reply."""
    found: dict[str, Prompt] = {}
    keys = ("name", "type", "system_prompt", "prompt_template", "output_format")
    for where, row in objects(path, keys, ("description", "category")):
        name = text(where, "name", row["name"])
        if name in names.values() and row["output_format"] != output_format:
            raise InputError(
                f"{where}: output_format: expected {output_format!r} for {name}, "
                f"got {row['output_format']!r}"
            )
        user = text(where, "prompt_template", row["prompt_template"])
        found[name] = Prompt(name, text(where, "system_prompt", row["system_prompt"]), user)
    if missing := set(names.values()) - found.keys():
        raise InputError(f"{path}:1: lacks the prompt {min(missing)!r}")
    return {key: found[name] for key, name in names.items()}


def grade(judgment: str) -> int | float:
    """The first number in double brackets, else the first in single ones, as FastChat reads it;
    `UNREADABLE` where there is none or it is no grade from 1 to 10."""
    match = next((found for pattern in _GRADES if (found := pattern.search(judgment))), None)
    if match is None or not LOWEST <= float(match[1]) <= HIGHEST:
        return UNREADABLE
    return float(match[1]) if "." in match[1] else int(match[1])


def judge(
    by: Speaker,
    questions: Sequence[Question],
    model: Answers,
    cache: Cache,
    *,
    prompts: Mapping[tuple[int, bool], Prompt] = OWN,
    references: Answers | None = None,
) -> list[dict[str, Any]]:
    """Judgements of a model, the first turns of all questions before the second ones. InputError
    where an answer is lacking, or a right answer that the judge is to be shown."""
    asked = []
    for turn in (1, 2):
        for question in questions:
            if len(question.turns) < turn:
                continue
            shown = question.category in NEED_REFERENCES
            prompt = prompts[turn, shown]
            values = _values(question, required(model, question, model.model), turn)
            if shown:
                right = right_answers(question, references)
                values |= {f"ref_answer_{i}": said for i, said in enumerate(right, start=1)}
            asked.append((question, turn, prompt, filled(prompt, values)))
    messages = [
        [{"role": "system", "content": prompt.system}, {"role": "user", "content": user}]
        for _, _, prompt, user in asked
    ]
    said = replies(by, messages, Options(0.0, REPLY_TOKENS), cache)
    return [
        {
            "question_id": question.id,
            "model": model.model,
            "judge": [by.name, prompt.name],
            "user_prompt": user,
            "judgment": reply.text,
            "score": grade(reply.text),
            "turn": turn,
            "tstamp": time.time(),
        }
        for (question, turn, prompt, user), reply in zip(asked, said, strict=True)
    ]


def _values(question: Question, answers: Sequence[str], turn: int) -> dict[str, str]:
    if turn == 1:
        return {"question": question.turns[0], "answer": answers[0]}
    pairs = zip(question.turns, answers, strict=False)
    return {
        f"{key}_{i}": said
        for i, pair in enumerate(pairs, start=1)
        for key, said in zip(("question", "answer"), pair, strict=True)
    }


def right_answers(question: Question, references: Answers | None) -> tuple[str, ...]:
    """Those to a question, of `references` or its own. InputError where there are none."""
    if references is not None:
        return required(references, question, references.model)
    if len(question.reference) < len(question.turns):
        raise InputError(
            f"question {question.id!r} ({question.category}): its judge is shown right answers; "
            "give them (--references)"
        )
    return question.reference


def filled(prompt: Prompt, values: Mapping[str, str]) -> str:
    """What the judge is told. InputError where the prompt has a field without a value."""
    try:
        return prompt.user.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"the judge's prompt {prompt.name}: {error!r} is no field of it") from None


def read_judgments(path: Path, seen: dict[Any, str] | None = None) -> list[Mapping[str, Any]]:
    """model_judgment/JUDGE_single.jsonl.

    A judgement that stands twice, in this file or one of `seen`, is an InputError (`judged_once`).
    """
    seen = {} if seen is None else seen
    found = []
    for where, row in objects(path, _JUDGED_KEYS, _JUDGED_ABOUT):
        identifier(where, "question_id", row["question_id"])
        text(where, "model", row["model"])
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise InputError(f"{where}: score: expected a number, got {score!r}")
        if score != -1 and not 1 <= score <= 10:
            raise InputError(f"{where}: score: expected 1 to 10, or -1 for none, got {score!r}")
        if row["turn"] not in range(1, TURNS + 1):
            raise InputError(f"{where}: turn: expected 1 or 2, got {row['turn']!r}")
        judged_once(where, row, [row["model"]], row["question_id"], seen)
        found.append(row)
    return found


def scores(judgments: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A row a model, best first: the mean of its grades on the first turn, the second and both,
    with bootstrap intervals of 95 % over questions, and how many judgements had no grade."""
    rows = []
    for model in dict.fromkeys(judgment["model"] for judgment in judgments):
        mine = [j for j in judgments if j["model"] == model]
        graded = [j for j in mine if j["score"] != UNREADABLE]
        if not graded:
            raise InputError(f"score: no judgement of {model} has a grade")
        parts = {"first_turn": (1,), "second_turn": (2,), "average": (1, 2)}
        row: dict[str, Any] = {"model": model, "judgments": len(mine)}
        row["unreadable"] = len(mine) - len(graded)
        for name, turns in parts.items():
            row[name] = _mean([j for j in graded if j["turn"] in turns], seed)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["average"]["mean"])


def _mean(graded: Sequence[Mapping[str, Any]], seed: int) -> dict[str, float] | None:
    """The mean over judgements, its interval over questions; None for none."""
    if not graded:
        return None
    by_question: dict[Any, list[float]] = {}
    for judgment in graded:
        by_question.setdefault(judgment["question_id"], []).append(judgment["score"])
    return bootstrap_grouped(by_question.values(), seed=seed)._asdict()
