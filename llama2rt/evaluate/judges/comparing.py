"""Win rates of versions by a judge that sees two answers side by side.

Every pair of answers is shown in both orders where the order could matter, and a prompt's outcome
is the mean of the two verdicts (Llama 2, section 3.4: judges favour a position). A prompt is the
unit of every interval. Equal answers are a tie that nobody is asked about.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.data.records import KINDS, Messages
from llama2rt.evaluate.agreement import gwet
from llama2rt.evaluate.intervals import bootstrap, wilson
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.judging import Judge, Question, Verdict

EVEN = 0.5


@dataclass(frozen=True)
class Answered:
    """A prompt with a version's answer."""

    messages: Messages
    text: str
    kind: str = "helpfulness"


Versions = Mapping[str, Mapping[str, Answered]]
"""answers by version, first to last, and by prompt id"""


@dataclass(frozen=True)
class Shown:
    """One pair of answers of versions a and b, and what became of it."""

    a: str
    b: str
    prompt: str
    question: Question
    """a's answer first"""

    @property
    def group(self) -> str:
        system = any(message["role"] == "system" for message in self.question.messages)
        return f"with{'' if system else 'out'} a system prompt"


@dataclass(frozen=True)
class Outcome:
    """What a judge said of one pair in its two orders."""

    a_first: Verdict
    b_first: Verdict
    """its `first` is the preference for b's answer"""

    @property
    def margin(self) -> float:
        """In [-1, 1], above 0 where a's answer is better; of b and a exactly the negative."""
        return self.a_first.first - self.b_first.first

    @property
    def a_second(self) -> float:
        """Preference for a's answer where it is shown second."""
        return 1 - self.b_first.first

    @property
    def agree(self) -> bool:
        """Whether both orders name the same winner."""
        return bool(np.sign(self.a_first.first - EVEN) == np.sign(EVEN - self.b_first.first))


EQUAL = Outcome(Verdict(EVEN), Verdict(EVEN))


def shown(versions: Versions, against: str | None = None) -> list[Shown]:
    """Every two versions, or each against the opponent `against`, on the prompts that both answer.
    ValueError for an unknown opponent, and for versions without a shared prompt."""
    if against is not None and against not in versions:
        raise ValueError(f"against: no version {against!r} among {', '.join(versions)}")
    couples = [(late, early) for early, late in combinations(versions, 2)]
    if against is not None:
        couples = [(name, against) for name in versions if name != against]
    found = []
    for a, b in couples:
        both = [prompt for prompt in versions[a] if prompt in versions[b]]
        if not both:
            raise ValueError(f"{a} and {b} share no prompt")
        for prompt in both:
            ours, theirs = versions[a][prompt], versions[b][prompt]
            if ours.messages != theirs.messages:
                raise ValueError(f"{a} and {b} answer other messages under the id {prompt!r}")
            question = Question(ours.messages, ours.text, theirs.text, ours.kind)
            found.append(Shown(a, b, prompt, question))
    return found


def outcomes(judge: Judge, pairs: Sequence[Shown], cache: Cache) -> list[Outcome]:
    """What `judge` says of each pair, asked in both orders unless it scores answers alone."""
    different = [i for i, pair in enumerate(pairs) if pair.question.first != pair.question.second]
    asked = [pairs[i].question for i in different]
    if judge.ordered:
        asked = [order for question in asked for order in (question, question.swapped())]
    verdicts = judge.verdicts(asked, cache)
    found = [EQUAL] * len(pairs)
    for number, i in enumerate(different):
        if judge.ordered:
            found[i] = Outcome(*verdicts[2 * number : 2 * number + 2])
        else:
            said = verdicts[number]
            found[i] = Outcome(said, Verdict(1 - said.first, said.readable))
    return found


def results(
    judge: Judge, pairs: Sequence[Shown], found: Sequence[Outcome], seed: int = 0
) -> dict[str, Any]:
    """A judge's rows: `pairs` of versions (`_row`), the win `matrix`, and where it was asked in
    both orders, its `position` bias over all of them."""
    rows = []
    for a, b in dict.fromkeys((pair.a, pair.b) for pair in pairs):
        mine = [i for i, pair in enumerate(pairs) if (pair.a, pair.b) == (a, b)]
        rows.append(
            {"a": a, "b": b, **_row([pairs[i] for i in mine], [found[i] for i in mine], seed)}
        )
    numbers: dict[str, Any] = {"name": judge.name, "kind": judge.kind, "pairs": rows}
    numbers["matrix"] = matrix(rows)
    if judge.ordered:
        numbers["position"] = _position(pairs, found, seed)
    return numbers


def matrix(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Names, and the win rate of the row over the column; None where two did not meet."""
    names = list(dict.fromkeys(name for row in rows for name in (row["b"], row["a"])))
    rates: dict[tuple[str, str], float] = {}
    for row in rows:
        rates[row["a"], row["b"]] = row["rate"]["mean"]
        rates[row["b"], row["a"]] = 1 - row["rate"]["mean"]
    return {"names": names, "row_over_column": [[rates.get((a, b)) for b in names] for a in names]}


def progress(rows: Sequence[Mapping[str, Any]], against: str) -> dict[str, dict[str, Any]]:
    """Win rates over the opponent by version: `helpfulness` on prompts of that kind, and
    `harmlessness` on safety prompts, each None where there are none (Llama 2, Fig. 11)."""
    axes = {"helpfulness": "helpfulness", "harmlessness": "safety"}
    return {
        row["a"]: {axis: row["kinds"].get(kind, {}).get("rate") for axis, kind in axes.items()}
        for row in rows
        if row["b"] == against
    }


def distinct(pairs: Sequence[Shown]) -> list[int]:
    """Indices of pairs, one of each two answers to a conversation in either order: versions with
    equal answers give the same pair again, which is no other observation of a judge."""
    first: dict[Any, int] = {}
    for i, pair in enumerate(pairs):
        asked = pair.question
        key = (json.dumps(asked.messages, sort_keys=True), frozenset((asked.first, asked.second)))
        first.setdefault(key, i)
    return list(first.values())


def agreement(
    pairs: Sequence[Shown], found: Mapping[str, Sequence[Outcome]]
) -> list[dict[str, Any]]:
    """How far every two judges name the same winner of the same pairs, `found` by judge and in the
    order of `pairs`, each of them once (`distinct`): the share of those that both decide, and
    Gwet's AC1 over win, tie and loss."""
    rows, kept = [], distinct(pairs)
    for one, other in combinations(found, 2):
        ours, theirs = (np.sign([found[name][i].margin for i in kept]) for name in (one, other))
        both = (ours != 0) & (theirs != 0)
        row: dict[str, Any] = {
            "judges": [one, other],
            "pairs": len(ours),
            "decided": int(both.sum()),
        }
        if both.any():
            same = float((ours == theirs)[both].sum())
            row["same_winner"] = wilson(same, int(both.sum()))._asdict()
        coefficient = gwet(np.stack([ours + 1, theirs + 1], axis=1), categories=3)
        row["ac1"] = {
            "mean": coefficient.coefficient,
            "low": coefficient.low,
            "high": coefficient.high,
        }
        rows.append(row)
    return rows


def _row(pairs: Sequence[Shown], found: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """Of two versions: all prompts, and those of each kind and group where there are several."""
    whole = _numbers(found, seed)
    whole["equal"] = sum(pair.question.first == pair.question.second for pair in pairs)
    whole["unreadable"] = sum(
        not verdict.readable for o in found for verdict in (o.a_first, o.b_first)
    )
    kinds = [pair.question.kind for pair in pairs]
    whole["kinds"] = {
        kind: _numbers([o for o, k in zip(found, kinds, strict=True) if k == kind], seed)
        for kind in KINDS
        if kind in kinds
    }
    groups = [pair.group for pair in pairs]
    whole["groups"] = {
        group: _numbers([o for o, g in zip(found, groups, strict=True) if g == group], seed)
        for group in dict.fromkeys(groups)
        if len(set(groups)) > 1
    }
    return whole


def _numbers(found: Sequence[Outcome], seed: int) -> dict[str, Any]:
    margins = np.array([o.margin for o in found])

    def average(values: ArrayLike) -> dict[str, float]:
        return bootstrap(values, seed=seed)._asdict()

    return {
        "prompts": len(found),
        "rate": average(EVEN + margins / 2),
        "wins": int((margins > 0).sum()),
        "ties": int((margins == 0).sum()),
        "losses": int((margins < 0).sum()),
        "a_first": average([o.a_first.first for o in found]),
        "a_second": average([o.a_second for o in found]),
        "consistent": wilson(float(sum(o.agree for o in found)), len(found))._asdict(),
    }


def _position(pairs: Sequence[Shown], found: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """As `evaluate.position`, over prompts, since several pairs of one prompt are alike: `first`,
    the mean preference for the first position, and `flipped`, the share of pairs of which the two
    orders say opposite things."""
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for pair, o in zip(pairs, found, strict=True):
        if pair.question.first != pair.question.second:
            shown_first = (o.a_first.first + o.b_first.first) / 2
            flipped = float((o.a_first.first - EVEN) * (o.a_second - EVEN) < 0)
            by_prompt.setdefault(pair.prompt, []).append((shown_first, flipped))
    if not by_prompt:
        return {"first": None, "flipped": None, "prompts": 0}
    means = np.array([np.mean(values, axis=0) for values in by_prompt.values()])
    return {
        "first": bootstrap(means[:, 0], seed=seed)._asdict(),
        "flipped": wilson(float(means[:, 1].sum()), len(means))._asdict(),
        "prompts": len(means),
    }
