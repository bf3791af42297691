"""MT-Bench's pairwise mode (FastChat's llm_judge, `fschat` 0.2.36): a judge sees the answers of two
models, in both orders, and says [[A]], [[B]] or [[C]] for a tie.

model_judgment/JUDGE_pair.jsonl has a record a question and turn: `model_1` and `model_2`, and
`g1_winner` and `g2_winner`, "model_1", "model_2", "tie" or "error" of the game that shows model_1
first and of the one that shows it second. Two games that disagree are a tie; a record with an error
counts for nothing.

A judgement that holds several of the labels is an error here; FastChat takes A before B before C.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks.mt_bench import (
    NEED_REFERENCES,
    REPLY_TOKENS,
    TURNS,
    Prompt,
    filled,
    right_answers,
)
from llama2rt.evaluate.chat_benchmarks.records import (
    Answers,
    Question,
    identifier,
    judged_once,
    objects,
    required,
    text,
)
from llama2rt.evaluate.intervals import bootstrap_grouped
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.speakers import Options, Speaker, replies

NAMES = {
    (1, False): "pair-v2",
    (1, True): "pair-math-v1",
    (2, False): "pair-v2-multi-turn",
    (2, True): "pair-math-v1-multi-turn",
}
"""FastChat's names by turn and whether right answers are shown"""
FORMAT = "[[A]]"
TIE, ERROR = "tie", "error"
_LABELS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": TIE}
_G1, _G2 = {"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"}
_WINNERS = ("model_1", "model_2", TIE, ERROR)
_KEYS = ("question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge")
_ABOUT = ("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment", "turn", "tstamp")

_SYSTEM = "You compare the answers of two assistants, A and B."
_SAY = (
    "Say first what is right and what is wrong about {what}: which is more correct, helpful and "
    "detailed enough? Length alone and the order in which they stand here count for nothing. Then "
    "end with a verdict on a line of its own: [[A]] if A is better, [[B]] if B is better, [[C]] "
    "for a tie."
)
_ONE = (
    "Question:\n{question}\n\n{right}Answer of A:\n{answer_a}\n\nAnswer of B:\n{answer_b}\n\n"
    + _SAY.replace("{what}", "the two answers")
)
_TWO = (
    "First question:\n{question_1}\n\n{right_1}Second question:\n{question_2}\n\n{right_2}"
    "A's first answer:\n{answer_a_1}\n\nA's second answer:\n{answer_a_2}\n\n"
    "B's first answer:\n{answer_b_1}\n\nB's second answer:\n{answer_b_2}\n\n"
    + _SAY.replace("{what}", "the two second answers")
)
_RIGHT = "A right answer, to compare with:\n{ref_answer_N}\n\n"


def _own(name: str, turn: int, shown: bool) -> Prompt:
    """This project's prompt, for those who have not FastChat's file."""
    first, second = (_RIGHT.replace("N", str(i)) * shown for i in (1, 2))
    whole = (_ONE if turn == 1 else _TWO).replace("{right}", first)
    whole = whole.replace("{right_1}", first).replace("{right_2}", second)
    return Prompt(f"llama2rt-{name}", _SYSTEM, whole)


OWN = {key: _own(name, *key) for key, name in NAMES.items()}


def verdict(judgment: str) -> str:
    """ "A", "B", `TIE`, or `ERROR` where none of the labels is there or several are."""
    found = [meant for label, meant in _LABELS.items() if label in judgment]
    return found[0] if len(found) == 1 else ERROR


def judge(
    by: Speaker,
    questions: Sequence[Question],
    model: Answers,
    baseline: Answers,
    cache: Cache,
    *,
    prompts: Mapping[tuple[int, bool], Prompt] = OWN,
    references: Answers | None = None,
) -> list[dict[str, Any]]:
    """Judgements of `model`, as model_1, against `baseline`, the first turns of all questions
    before the second ones. InputError where an answer is lacking, or a right answer that the judge
    is to be shown, and where both are of one name."""
    if model.model == baseline.model:
        raise InputError(f"baseline: {baseline.model} is the model itself")
    asked = []
    for turn in range(1, TURNS + 1):
        for question in questions:
            if len(question.turns) < turn:
                continue
            shown = question.category in NEED_REFERENCES
            prompt = prompts[turn, shown]
            values = {"question": question.turns[0]}
            if turn > 1:
                values = {f"question_{i}": said for i, said in enumerate(question.turns, start=1)}
            if shown:
                right = right_answers(question, references)
                values |= {f"ref_answer_{i}": said for i, said in enumerate(right, start=1)}
            sides = [required(a, question, a.model) for a in (model, baseline)]
            games = [
                filled(prompt, values | _answers("a", a, turn) | _answers("b", b, turn))
                for a, b in (sides, sides[::-1])
            ]
            asked.append((question, turn, prompt, games))
    messages = [
        [{"role": "system", "content": prompt.system}, {"role": "user", "content": game}]
        for _, _, prompt, games in asked
        for game in games
    ]
    said = [r.text for r in replies(by, messages, Options(0.0, REPLY_TOKENS), cache)]
    records = []
    for number, (question, turn, prompt, games) in enumerate(asked):
        first, second = said[2 * number : 2 * number + 2]
        winners = [verdict(first), verdict(second)]
        records.append(
            {
                "question_id": question.id,
                "model_1": model.model,
                "model_2": baseline.model,
                "g1_winner": _G1.get(winners[0], winners[0]),
                "g2_winner": _G2.get(winners[1], winners[1]),
                "judge": [by.name, prompt.name],
                "g1_user_prompt": games[0],
                "g1_judgment": first,
                "g2_user_prompt": games[1],
                "g2_judgment": second,
                "turn": turn,
                "tstamp": time.time(),
            }
        )
    return records


def _answers(side: str, turns: Sequence[str], turn: int) -> dict[str, str]:
    if turn == 1:
        return {f"answer_{side}": turns[0]}
    return {f"answer_{side}_{i}": said for i, said in enumerate(turns[:turn], start=1)}


def holds_pairs(path: Path) -> bool:
    """Whether a file of judgements begins with one of a pair."""
    _, first = next(objects(path, ()))
    return "g1_winner" in first


def read_judgments(path: Path, seen: dict[Any, str] | None = None) -> list[Mapping[str, Any]]:
    """model_judgment/JUDGE_pair.jsonl.

    A judgement that stands twice, in this file or one of `seen`, is an InputError (`judged_once`).
    """
    seen = {} if seen is None else seen
    found = []
    for where, row in objects(path, _KEYS, _ABOUT):
        identifier(where, "question_id", row["question_id"])
        names = [text(where, key, row[key]) for key in ("model_1", "model_2")]
        if names[0] == names[1]:
            raise InputError(f"{where}: model_2: {names[1]!r} is model_1 too")
        for key in ("g1_winner", "g2_winner"):
            if row[key] not in _WINNERS:
                raise InputError(
                    f"{where}: {key}: expected {', '.join(_WINNERS)}, got {row[key]!r}"
                )
        judged_once(where, row, names, row["question_id"], seen)
        found.append(row)
    return found


def scores(
    judgments: Sequence[Mapping[str, Any]], against: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """A row a model, best first, as FastChat's show_result.py counts: `win`, `loss` and `tie`
    records, `win_rate`, `loss_rate`, and `win_rate_adjusted`, in which a tie is half a win, with
    its bootstrap interval of 95 % over questions; `first`, what the judge gave to the answer that
    it was shown first, `flipped`, the share of records whose orders say opposite things, `errors`.

    against: only what is judged against this model, and no row of its own. InputError where nothing
    is judged.
    """
    if against is not None:
        judgments = [j for j in judgments if against in (j["model_1"], j["model_2"])]
        if not judgments:
            raise InputError(f"baseline: nothing is judged against {against}")
    names = dict.fromkeys(name for j in judgments for name in (j["model_1"], j["model_2"]))
    rows = []
    for model in names:
        if model == against:
            continue
        mine = [j for j in judgments if model in (j["model_1"], j["model_2"])]
        rows.append({"model": model, **_row(model, mine, seed)})
    return sorted(rows, key=lambda row: -row["win_rate_adjusted"]["mean"])


def _row(model: str, judgments: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    counted = [j for j in judgments if ERROR not in (j["g1_winner"], j["g2_winner"])]
    if not counted:
        raise InputError(f"g1_winner: no judgement of {model} has a verdict")
    won: dict[Any, list[float]] = {}
    first, flipped = [], 0
    for judgment in counted:
        games = (judgment["g1_winner"], judgment["g2_winner"])
        value = 0.5
        if games[0] == games[1] != TIE:
            value = float(judgment[games[0]] == model)
        won.setdefault(judgment["question_id"], []).append(value)
        shown_first = ("model_1", "model_2")
        first += [
            0.5 if g == TIE else float(g == f) for g, f in zip(games, shown_first, strict=True)
        ]
        flipped += set(games) == {"model_1", "model_2"}
    values = np.concatenate(list(won.values()))
    interval = bootstrap_grouped(won.values(), seed=seed)
    return {
        "win": int((values == 1).sum()),
        "loss": int((values == 0).sum()),
        "tie": int((values == 0.5).sum()),
        "win_rate": float((values == 1).mean()),
        "loss_rate": float((values == 0).mean()),
        "win_rate_adjusted": interval._asdict(),
        "first": float(np.mean(first)),
        "flipped": flipped / len(counted),
        "errors": len(judgments) - len(counted),
    }
