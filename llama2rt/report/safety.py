"""The sections of a report that are about safety, from the numbers of `evaluate`."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama2rt.report import figures
from llama2rt.report.html import Block, Section, Table

DISTILLATION = "Context distillation"


def distillation(summary: Mapping[str, Any]) -> list[Section]:
    """What `evaluate.distillation.summary` says."""
    rows: Sequence[Mapping[str, Any]] = summary["distilled"]
    names = [f"{row['by']}: {row['value']}" if row["value"] else row["by"] for row in rows]
    kept, gain = ([_triple(row[key]) for row in rows] for key in ("kept", "gain"))
    panels = [
        figures.Panel("kept", kept, share=True),
        figures.Panel("gain in safety score, of what is kept", gain),
    ]
    header = ("prompts", "of", "kept", "safety score without", "with", "gain of what is kept")
    table = [
        (
            name,
            row["prompts"],
            *(_triple(row[key]) for key in ("kept", "original", "answer", "gain")),
        )
        for name, row in zip(names, rows, strict=True)
    ]
    caption = (
        f"{summary['prompts']} adversarial prompts, each answered without a pre-prompt and with "
        "one; both are scored by the safety reward model as answers to the prompt without it, and "
        "the second is learned where its score is higher. "
        f"{summary['unfinished']} prompts got no finished answer with a pre-prompt. Scores lie in "
        "(0, 1); intervals are of 95 %, over prompts."
    )
    blocks: list[Block] = [
        figures.by_version(
            names,
            panels,
            title="What the safety reward model keeps",
            name="prompts",
            over="adversarial prompts",
        ),
        Table(header, table, caption),
    ]
    return [Section(DISTILLATION, blocks)]


SCORES = {"safety_score": "safety score", "helpfulness_score": "helpfulness score"}
RATES = {"violation": "violations", "false_refusal": "false refusals"}


def study(numbers: Mapping[str, Any]) -> list[Section]:
    """Of the share-of-safety-data study (`pipeline.safety_study`): Figures 14 and 15's shape."""
    rows: Sequence[Mapping[str, Any]] = numbers["safety_study"]
    names = [row["name"] for row in rows]
    panels = [
        figures.Panel(label, [_triple(row[key]) for row in rows], share=key in RATES)
        for key, label in (SCORES | RATES).items()
    ]
    columns = [panel.estimates for panel in panels]
    of_seeds = f", means over {numbers['seeds']} training seeds" if numbers["seeds"] > 1 else ""
    caption = (
        "Mean scores in (0, 1) of the safety reward model on adversarial prompts and of the "
        "helpfulness reward model on the others; violations are unsafe answers to the former, "
        f"false refusals refusals of the latter. Intervals of 95 % over prompts{of_seeds}."
    )
    blocks: list[Block] = [
        figures.by_version(names, panels, title="By the share of safety data", name="share"),
        Table(
            ("safety data", *(panel.label for panel in panels)),
            list(zip(names, *columns, strict=True)),
            caption,
        ),
    ]
    values = sorted({value for row in rows for value in row["by"].get("risk_category", ())})
    if values:
        header = ("safety data", *(f"{v}, {of}" for v in values for of in RATES.values()))
        blocks.append(
            Table(header, [_by_category(row, values) for row in rows], "By risk category")
        )
    return [Section("Share of safety data", blocks)]


def _by_category(row: Mapping[str, Any], values: Sequence[str]) -> tuple[object, ...]:
    found = row["by"].get("risk_category", {})
    return (row["name"], *(_triple(found.get(v, {}).get(key)) for v in values for key in RATES))


def _triple(estimate: Mapping[str, float] | None) -> tuple[float, float, float] | None:
    return None if estimate is None else (estimate["mean"], estimate["low"], estimate["high"])
