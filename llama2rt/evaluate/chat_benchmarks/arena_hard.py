"""Arena-Hard's files (lmarena/arena-hard-auto), v0.1 and v2.0: each model against a baseline, two
games a question with the sides changed, five labels from [[A>>B]] to [[B>>A]].

question.jsonl, model_answer/MODEL.jsonl and model_judgment/JUDGE/MODEL.jsonl. In the first game the
baseline is shown as A, in the second as B. A verdict of much better counts as three battles.

The score is the model's win rate over the baseline by a Bradley-Terry model of all battles. Where
each model meets the baseline alone, as here, that is the share of battles it won, a tie half: the
likelihood of each model's strength is that of a coin. Their bootstrap draws battles, though the two
games of a question, and the three battles of one verdict, are one observation; the interval over
questions is given beside it.

`style_control` has the score for answers of equal style. Left out: asking a judge once more that
gave no label.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
)
from llama2rt.evaluate.intervals import bootstrap_grouped
from llama2rt.evaluate.judges.cache import Cache, key_of
from llama2rt.evaluate.judges.speakers import Options, Reply, Speaker, replies

Version = Literal["v0.1", "v2.0"]
WEIGHT = 3
"""battles that a verdict of much better counts as"""
ROUNDS = 100
SEED = 42
ENDS = {"v0.1": (2.5, 97.5), "v2.0": (5.0, 95.0)}
"""percentiles of the bootstrap that each version reports"""
_RESAMPLES = 2000
_REPLY_TOKENS = 4096
_LABELS = {
    "A>>B": (0.0, WEIGHT),
    "A>B": (0.0, 1),
    "A=B": (0.5, 1),
    "B>A": (1.0, 1),
    "B>>A": (1.0, WEIGHT),
}
"""(what the second side wins, battles)"""
# v2.0 reads these too.
_MIRRORED = {"B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A", "B<A": "A>B", "B<<A": "A>>B"}
_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")
_LABEL_IN_ONE = re.compile(r"\[([AB<>=]+)\]")
_SYSTEM = (
    "You compare the answers of two assistants, A and B, to a user's prompt. Work out an answer of "
    "your own first, then say what is right and wrong, helpful, to the point or missing in each, "
    "and end with one label: [[A>>B]] if A is much better, [[A>B]] if A is better, [[A=B]] for a "
    "tie, [[B>A]] if B is better, [[B>>A]] if B is much better."
)
_USER = "Prompt:\n{question}\n\nAnswer of A:\n{first}\n\nAnswer of B:\n{second}"


@dataclass(frozen=True)
class Layout:
    """How the two versions name things."""

    version: Version
    id: str
    """key of a question's id"""
    model: str
    """key of the model's name in its answers"""


LAYOUTS: dict[str, Layout] = {
    "v0.1": Layout("v0.1", "question_id", "model_id"),
    "v2.0": Layout("v2.0", "uid", "model"),
}


def read_questions(path: Path, layout: Layout) -> list[Question]:
    """question.jsonl."""
    old = layout.version == "v0.1"
    needed = (layout.id, "turns" if old else "prompt")
    found, seen = [], dict[Any, str]()
    for where, row in objects(path, needed, ("category", "subcategory", "cluster")):
        number = identifier(where, layout.id, row[layout.id])
        new(where, layout.id, number, seen)
        if old:
            turns = _contents(where, "turns", row["turns"])
            if len(turns) != 1:
                raise InputError(f"{where}: turns: expected one, got {len(turns)}")
        else:
            turns = (text(where, "prompt", row["prompt"]),)
        category = text(where, "category", row.get("category", ""), blank=True)
        found.append(Question(number, turns, category))
    return found


def read_answers(path: Path, layout: Layout) -> Answers:
    """model_answer/MODEL.jsonl; of a question that is answered again the last answer. The model's
    name is the file's, as their tools take it."""
    old = layout.version == "v0.1"
    needed = (layout.id, layout.model, "choices" if old else "messages")
    about = ("answer_id", "ans_id", "tstamp", "conv_metadata", "metadata")
    turns: dict[Id, tuple[str, ...]] = {}
    for where, row in objects(path, needed, about):
        number = identifier(where, layout.id, row[layout.id])
        try:
            if old:
                turns[number] = _contents(where, "choices[0].turns", row["choices"][0]["turns"])
            else:
                answer = row["messages"][-1]["content"]["answer"]
                turns[number] = (text(where, "answer", answer, blank=True),)
        except (KeyError, IndexError, TypeError):
            expected = "choices[0].turns" if old else "messages[-1].content.answer"
            raise InputError(f"{where}: expected {expected}") from None
    return Answers(path.name.removesuffix(".jsonl"), turns)


def write_answers(path: Path, model: str, answered: Sequence[Answered], layout: Layout) -> None:
    """model_answer/MODEL.jsonl. Lengths in tokens are the model's own; theirs are GPT-4o's."""
    records = []
    for one in answered:
        reply, question = one.replies[0], one.question
        about = {"token_len": reply.completion_tokens, **markdown(reply.text)}
        name = key_of(model, question.id, reply.text)[:22]
        said: dict[str, Any]
        if layout.version == "v0.1":
            turn = {"content": reply.text, "token_len": reply.completion_tokens}
            said = {"question_id": question.id, "answer_id": name, "model_id": model}
            said |= {"choices": [{"index": 0, "turns": [turn]}], "tstamp": time.time()}
            said["conv_metadata"] = about
        else:
            messages = [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": reply.text}},
            ]
            said = {"uid": question.id, "ans_id": name, "model": model, "messages": messages}
            said |= {"tstamp": time.time(), "metadata": about}
        records.append(said)
    atomic.write(path, "".join(f"{json.dumps(r, ensure_ascii=False)}\n" for r in records))


def markdown(answer: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold passages outside code, as their style control counts them."""
    prose = re.sub(r"```[^`]*```", "``````", answer)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {
            "ordered": count(r"^\s*\d+\.\s"),
            "unordered": count(r"^\s*[-*+]\s"),
        },
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def label(judgment: str, version: Version) -> str | None:
    """The verdict: in v0.1 the only label of the text, None where there are several or none; in
    v2.0 the last one, in single brackets where none is in double ones."""
    if version == "v0.1":
        found = set(_LABEL.findall(judgment))
        return found.pop() if len(found) == 1 else None
    for pattern in (_LABEL, _LABEL_IN_ONE):
        if labels := pattern.findall(judgment.upper()):
            return str(labels[-1])
    return None


def judge(
    by: Speaker,
    questions: Sequence[Question],
    baseline: Answers,
    model: Answers,
    cache: Cache,
    layout: Layout,
) -> list[dict[str, Any]]:
    """Judgements of `model`, two games a question."""
    asked: list[list[dict[str, str]]] = []
    for question in questions:
        sides = [required(a, question, a.model)[0] for a in (baseline, model)]
        for first, second in (sides, sides[::-1]):
            content = _USER.format(question=question.turns[0], first=first, second=second)
            asked.append(
                [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
            )
    said = replies(by, asked, Options(0.0, _REPLY_TOKENS), cache)
    games = [_game(*one, layout) for one in zip(asked, said, strict=True)]
    records: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        about = {layout.id: question.id, "model": model.model, "judge": by.name}
        if layout.version == "v2.0":
            about |= {"category": question.category, "baseline": baseline.model}
        records.append({**about, "games": games[2 * number : 2 * number + 2]})
    return records


def _game(messages: list[dict[str, str]], reply: Reply, layout: Layout) -> dict[str, Any]:
    score = label(reply.text, layout.version)
    if layout.version == "v0.1":
        return {"user_prompt": messages[-1]["content"], "judgment": reply.text, "score": score}
    return {"score": score, "judgment": {"answer": reply.text}, "prompt": messages}


def read_judgments(
    path: Path, layout: Layout, seen: dict[Any, str] | None = None
) -> list[Mapping[str, Any]]:
    """model_judgment/JUDGE/MODEL.jsonl.

    A judgement that stands twice, in this file or one of `seen`, is an InputError, since it would
    count as two: their tool skips what is judged, and has both games in one record.
    """
    seen = {} if seen is None else seen
    found = []
    about = ("judge", "category", "baseline")
    for where, row in objects(path, (layout.id, "model", "games"), about):
        identifier(where, layout.id, row[layout.id])
        text(where, "model", row["model"])
        if "category" in row:
            text(where, "category", row["category"])
        games = row["games"]
        if not isinstance(games, list) or len(games) != 2:
            raise InputError(f"{where}: games: expected two")
        for game in games:
            if game is None:
                continue
            if not isinstance(game, Mapping) or "score" not in game:
                raise InputError(f"{where}: games: expected an object with a score, or null")
            score = game["score"]
            if score is not None and (
                not isinstance(score, str) or _MIRRORED.get(score, score) not in _LABELS
            ):
                raise InputError(f"{where}: score: expected a label such as A>B, got {score!r}")
        judged_once(where, row, [row["model"]], row[layout.id], seen)
        found.append(row)
    return found


def scores(
    judgments: Sequence[Mapping[str, Any]], layout: Layout, seed: int = SEED
) -> list[dict[str, Any]]:
    """A row a model and category, best first, in per cent: `score` with `bounds` as their bootstrap
    of battles has them and `interval`, the 95 % one over questions. v0.1 leaves a game without a
    label out, v2.0 the question with it."""
    rows = []
    groups = dict.fromkeys((j["model"], j.get("category", "")) for j in judgments)
    if layout.version == "v0.1":
        groups = dict.fromkeys((model, "") for model, _ in groups)
    for model, category in groups:
        mine = [j for j in judgments if j["model"] == model]
        if layout.version == "v2.0":
            mine = [j for j in mine if j.get("category", "") == category]
        counted = [found for judgment in mine if (found := battles(judgment, layout))]
        if not counted:
            raise InputError(f"score: no judgement of {model} has a label")
        flat = np.array([won for found in counted for won in found])
        row = {"model": model, "category": category, "score": 100 * float(flat.mean())}
        row |= {"bounds": _of_battles(flat, layout, seed), "interval": _of_questions(counted, seed)}
        rows.append(
            row | {"battles": len(flat), "questions": len(mine), "unreadable": unreadable(mine)}
        )
    return sorted(rows, key=lambda row: (row["category"], -row["score"]))


def unreadable(judgments: Sequence[Mapping[str, Any]]) -> int:
    """How many games have no label."""
    return sum(game is None or game["score"] is None for j in judgments for game in j["games"])


def battles(judgment: Mapping[str, Any], layout: Layout) -> list[float]:
    """What the model won of one question's battles, 1, 0.5 or 0 each, in the order of its tools:
    v2.0 has those of the second game first."""
    outcomes: list[float] = []
    labels = [None if game is None else game["score"] for game in judgment["games"]]
    if layout.version == "v2.0" and None in labels:
        return []
    order = (0, 1) if layout.version == "v0.1" else (1, 0)
    for swapped in order:
        given = labels[swapped]
        if given is None:
            continue
        won, weight = _LABELS[_MIRRORED.get(given, given)]
        outcomes += [1 - won if swapped else won] * weight
    return outcomes


def _of_battles(won: np.ndarray, layout: Layout, seed: int) -> list[float]:
    generator = np.random.RandomState(seed)  # the kind of generator that pandas draws from
    drawn = [generator.choice(len(won), len(won)) for _ in range(ROUNDS)]
    means = [100 * float(won[rows].mean()) for rows in drawn]
    return [float(end) for end in np.percentile(means, ENDS[layout.version])]


def _of_questions(outcomes: Sequence[Sequence[float]], seed: int) -> list[float]:
    found = bootstrap_grouped(outcomes, resamples=_RESAMPLES, seed=seed)
    return [100 * found.low, 100 * found.high]


def _contents(where: str, key: str, value: Any) -> tuple[str, ...]:
    """The texts of a list of {content}."""
    if not isinstance(value, list) or not value or not all(isinstance(v, Mapping) for v in value):
        raise InputError(f"{where}: {key}: expected a list of objects with content")
    return tuple(
        text(where, f"{key}[{i}].content", turn.get("content"), blank=True)
        for i, turn in enumerate(value)
    )
