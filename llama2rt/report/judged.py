"""The sections of a report that show how judges see versions, and how they do on tasks.

The numbers are those of judged.json (`llama2rt judge`) and of scores by task; nothing is computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama2rt.report import figures
from llama2rt.report.html import Answers, Block, Dialogues, Section, Table

JUDGES = "Judges"
TASKS = "Tasks"
ANSWERS = "Answers"


def sections(judged: Mapping[str, Any]) -> list[Section]:
    """What judges say of versions: both axes against the opponent, win matrices, every pair with
    its parts, the judges' bias for a position, what they cost and how far they agree."""
    judges: Sequence[Mapping[str, Any]] = judged["judges"]
    if not judges:
        return []
    blocks: list[Block] = []
    if judged.get("against") is not None:
        sides = {
            row["name"]: {
                name: (_estimate(axes["helpfulness"]), _estimate(axes["harmlessness"]))
                for name, axes in row["progress"].items()
            }
            for row in judges
            if "progress" in row
        }
        blocks.append(figures.two_sides(sides, judged["against"]))
    for row in judges:
        names, rates = row["matrix"]["names"], row["matrix"]["row_over_column"]
        table = np.array([[np.nan if r is None else r for r in line] for line in rates], float)
        if len(names) > 2 and judged.get("against") is None:
            title = f"Win rates between versions, by {row['name']}"
            blocks.append(figures.win_matrix(names, table, title=title))
    blocks += [_pairs(judges), _bias(judges)]
    if judged.get("agreement"):
        blocks.append(_agreement(judged["agreement"]))
    if judged.get("versions"):
        blocks.append(_lengths(judged["versions"]))
    text = (
        "Each pair of answers was shown in both orders where the order could matter; a prompt's "
        "outcome is the mean of the two. Intervals are of 95 %, over prompts."
    )
    return [Section(JUDGES, blocks, text)]


def tasks(scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[Section]:
    """Scores by version and task, each {mean, low, high} in [0, 1]."""
    names = list(dict.fromkeys(task for found in scores.values() for task in found))
    if not names:
        return []
    means = {
        version: [found[task]["mean"] if task in found else None for task in names]
        for version, found in scores.items()
    }
    blocks: list[Block] = [figures.radar(names, means)] if len(names) > 2 else []
    rows = [
        (version, *(_cell(found.get(task)) for task in names)) for version, found in scores.items()
    ]
    blocks.append(Table(("version", *names), rows))
    return [Section(TASKS, blocks)]


def answers(samples: Sequence[Answers]) -> list[Section]:
    """The same prompts answered by every version, side by side."""
    return [Section(ANSWERS, [Dialogues(samples)])] if samples else []


def _pairs(judges: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in judges:
        for pair in row["pairs"]:
            parts = {"all": pair, **pair.get("kinds", {}), **pair.get("groups", {})}
            for part, numbers in parts.items():
                if part == "all" or numbers["prompts"] < pair["prompts"]:
                    counts = (numbers["wins"], numbers["ties"], numbers["losses"])
                    who = (row["name"], pair["a"], pair["b"], part, numbers["prompts"])
                    rows.append((*who, _estimate(numbers["rate"]), *counts))
    header = ("judge", "version", "against", "prompts of", "prompts", "win rate")
    return Table((*header, "won", "tied", "lost"), rows, "Ties count half.")


def _bias(judges: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in judges:
        position, cost = row.get("position") or {}, row.get("cost") or {}
        counts = [cost.get(key) for key in ("requests", "asked", "from_cache")]
        tokens = cost.get("prompt_tokens", 0) + cost.get("completion_tokens", 0) if cost else None
        unreadable = sum(pair.get("unreadable", 0) for pair in row["pairs"])
        raters = [
            f"{name} {value['mean']:.2f}"
            for pair in row["pairs"]
            for name, value in pair.get("agreement", {}).items()
        ]
        rows.append(
            (
                *(row["name"], row["kind"]),
                *(_cell(position.get(key)) for key in ("first", "flipped")),
                *(unreadable, *counts, tokens, ", ".join(raters) or None),
            )
        )
    header = ("judge", "kind", "for the first position", "opposite in the other order")
    costs = ("unreadable", "requests", "asked", "from the cache", "tokens", "raters agree")
    return Table(
        (*header, *costs), rows, "A judge without a bias is at 0.5 for the first position."
    )


def _agreement(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        ("judges", "pairs that both decide", "same winner", "AC1"),
        [
            (
                " and ".join(row["judges"]),
                row["decided"],
                _cell(row.get("same_winner")),
                _cell(row["ac1"]),
            )
            for row in rows
        ],
        "AC1 is Gwet's coefficient over win, tie and loss.",
    )


def _lengths(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        ("version", "prompts", "words", "characters"),
        [
            (row["name"], row["prompts"], _estimate(row["words"]), _estimate(row["characters"]))
            for row in rows
        ],
        "A judge may take length for quality: compare win rates with it.",
    )


def _estimate(value: Mapping[str, Any] | None) -> figures.Estimate | None:
    return None if value is None else (value["mean"], value["low"], value["high"])


def _cell(value: Mapping[str, Any] | None) -> object:
    if value is None or value.get("low") is None or value.get("high") is None:
        return None if value is None else value["mean"]
    return value["mean"], value["low"], value["high"]
