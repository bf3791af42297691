"""What has been judged so far, and how far annotators agree."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama2rt.data.records import KINDS, RATINGS
from llama2rt.evaluate import human
from llama2rt.evaluate.agreement import Agreement, gwet
from llama2rt.evaluate.intervals import Interval, wilson
from llama2rt.people.store import Store, week

Row = Mapping[str, Any]
_JUDGED = """SELECT j.*, t.kind, t.first_variant, t.second_variant, n.name FROM judgements j
JOIN tasks t ON t.id = j.task JOIN annotators n ON n.id = j.annotator
WHERE j.undone = 0 ORDER BY j.id"""


_TASKS = """SELECT CASE WHEN complete THEN 'complete' WHEN state = 'ready' THEN 'open'
ELSE state END state, count(*) n FROM tasks WHERE state != 'dropped' GROUP BY 1"""


def summarise(store: Store) -> dict[str, Any]:
    """Counts, agreement and, for evaluation, wins, ties and losses of the first variant."""
    rows: list[Row] = [dict(row) for row in store.rows(_JUDGED)]
    judged = [row for row in rows if row["skipped"] is None]
    tasks = store.rows(_TASKS)
    first = [row["flipped"] == _second_better(row) for row in judged if _decided(row)]
    summary: dict[str, Any] = {
        "mode": store.recall("mode"),
        "tasks": {row["state"]: row["n"] for row in tasks},
        "judgements": len(judged),
        "skipped": dict(Counter(row["skipped"].split(":")[0] for row in rows if row["skipped"])),
        "annotators": dict(Counter(row["name"] for row in judged)),
        "weeks": dict(sorted(Counter(week(row["time"]) for row in judged).items())),
        "shown_first_is_better": _share(sum(first), len(first)),
    }
    if summary["mode"] == "evaluation":
        return summary | _evaluation(judged)
    kinds = {kind: [row for row in judged if row["kind"] == kind] for kind in KINDS}
    return summary | {kind: _preference(found) for kind, found in kinds.items() if found}


def _preference(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one kind of batch: how often each rating and label was given, and agreement on them."""
    labels = Counter(_label(row) for row in rows if row["first_safe"] is not None)
    return {
        "judgements": len(rows),
        "ratings": {rating: sum(row["rating"] == rating for row in rows) for rating in RATINGS},
        "safety": dict(labels),
        "agreement": {
            "choice, AC1": _agreement(rows, lambda row: int(row["chosen"] == "second"), 2),
            "choice with rating, AC2": _agreement(rows, _point, 2 * len(RATINGS), "ordinal"),
            "safety of both, AC1": _agreement(rows, _safety, 4),
        },
    }


def _evaluation(rows: Sequence[Row]) -> dict[str, Any]:
    """Agreement on the 7 points, and what each variant's answers are worth against the first's. A
    prompt counts once: by the median of its raters."""
    judged = [
        human.Judged((r["first_variant"], r["second_variant"]), r["task"], r["name"], r["score"])
        for r in rows
    ]
    results = []
    for (first, second), mine in human.by_versions(judged).items():
        points = list(human.points(mine).values())
        wins, losses = sum(p > 0 for p in points), sum(p < 0 for p in points)
        ties = len(points) - wins - losses
        results.append(
            {
                "variant": first,
                "against": second,
                "prompts": len(points),
                "wins": _share(wins, len(points)),
                "ties": _share(ties, len(points)),
                "losses": _share(losses, len(points)),
                "win_rate": _share(wins + ties / 2, len(points)),
                "agreement": _on_points(mine),
            }
        )
    return {"results": results, "agreement": _on_points(judged)}


def _on_points(judged: Sequence[human.Judged]) -> dict[str, Any]:
    """Gwet's coefficients on the 7 points; None while no task has two ratings."""
    found = human.agreement(judged)
    names = {f"7 points, {name}": found.get(name) for name in ("AC1", "AC2")}
    return {name: _numbers(*value) if value else None for name, value in names.items()}


def _agreement(
    rows: Sequence[Row],
    category: Callable[[Row], int | None],
    categories: int,
    weights: str = "nominal",
) -> dict[str, Any] | None:
    """Gwet's coefficient over tasks; None while no task has two ratings."""
    raters = {name: column for column, name in enumerate(sorted({row["name"] for row in rows}))}
    items: dict[int, np.ndarray] = {}
    for row in rows:
        if (found := category(row)) is not None:
            item = items.setdefault(row["task"], np.full(len(raters), np.nan))
            item[raters[row["name"]]] = found
    if not any((~np.isnan(item)).sum() >= 2 for item in items.values()):
        return None
    agreement = gwet(list(items.values()), categories=categories, weights=weights)
    return _numbers(agreement, sum((~np.isnan(item)).sum() >= 2 for item in items.values()))


def _numbers(agreement: Agreement, items: int) -> dict[str, Any]:
    known = not np.isnan(agreement.standard_error)
    return {
        "coefficient": agreement.coefficient,
        "interval": [agreement.low, agreement.high] if known else None,
        "observed": agreement.observed,
        "rated_by_two_or_more": int(items),
    }


def _share(count: float, trials: int) -> dict[str, Any] | None:
    """A share with Wilson's 95 % interval; None of nothing."""
    if not trials:
        return None
    share: Interval = wilson(count, trials)
    return {"count": count, "of": trials, "share": share.mean, "interval": [share.low, share.high]}


def _decided(row: Row) -> bool:
    return row["chosen"] is not None or bool(row["score"])


def _second_better(row: Row) -> bool:
    return row["chosen"] == "second" or (row["score"] or 0) < 0


def _point(row: Row) -> int:
    """From the first response significantly better, 0, to the second one, 7."""
    step = RATINGS.index(row["rating"])
    return 2 * len(RATINGS) - 1 - step if row["chosen"] == "second" else step


def _safety(row: Row) -> int | None:
    if row["first_safe"] is None:
        return None
    return 2 * row["first_safe"] + row["second_safe"]


def _label(row: Row) -> str:
    if row["first_safe"] != row["second_safe"]:
        return "chosen_safe"
    return "both_safe" if row["first_safe"] else "both_unsafe"


def describe(summary: Mapping[str, Any]) -> str:
    """The same as lines for a terminal."""
    lines = [f"{summary['judgements']} judgements"]
    for key in ("annotators", "weeks", "tasks", "skipped"):
        if summary[key]:
            counts = ", ".join(f"{name} {count}" for name, count in summary[key].items())
            lines.append(f"  {key}: {counts}")
    lines.append(f"  response A better than B: {percent(summary['shown_first_is_better'])}")
    for kind in (kind for kind in KINDS if kind in summary):
        found = summary[kind]
        lines.append(f"{kind}: {found['judgements']} judgements")
        for key in ("ratings", "safety"):
            if found[key]:
                counts = ", ".join(f"{name} {count}" for name, count in found[key].items())
                lines.append(f"  {key}: {counts}")
        lines += _agreement_lines(found["agreement"])
    for row in summary.get("results", []):
        lines.append(f"{row['variant']} against {row['against']}: {row['prompts']} prompts")
        lines += [f"  {key}: {percent(row[key])}" for key in ("wins", "ties", "losses", "win_rate")]
        if len(summary["results"]) > 1:
            lines += _agreement_lines(row["agreement"])
    return "\n".join([*lines, *_agreement_lines(summary.get("agreement", {}))])


def _agreement_lines(found: Mapping[str, Any]) -> Iterable[str]:
    return [f"  {name}: {coefficient(value)}" for name, value in found.items() if value]


def percent(share: Mapping[str, Any] | None) -> str:
    """A share and its interval."""
    if share is None:
        return "none yet"
    low, high = share["interval"]
    return f"{share['share']:.1%} ({low:.1%} to {high:.1%}; {share['count']:g} of {share['of']})"


def coefficient(value: Mapping[str, Any] | None) -> str:
    """A coefficient of agreement and its interval."""
    if value is None:
        return "no pair has two ratings yet"
    ends = value["interval"]
    interval = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f"{value['coefficient']:.2f}{interval}, pairs: {value['rated_by_two_or_more']}"
