"""The sections of a study of reward models, from its numbers: a table and a figure for each of the
papers' (Llama 2, Tables 7, 8, 28, 29 and Figure 6; RLHF Workflow, section 2).

The numbers are those that a study leaves in report.json (`pipeline.study`); what is absent is not
drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama2rt.report import figures, policy_studies
from llama2rt.report.html import Block, Section, Table, cell

Numbers = Mapping[str, Any]

_ANNOTATORS = "annotators among themselves"
_LABELS = {
    "chosen_safe": "chosen safe, other unsafe",
    "both_safe": "both safe",
    "both_unsafe": "both unsafe",
}


def sections(numbers: Numbers, *, drawn: bool = True) -> list[Section]:
    """Of the page of a study; its tables alone where nothing is to be `drawn`."""
    if "policies" in numbers:
        return [policy_studies.section(numbers)]
    study, tests = numbers["study"], numbers["tests"]
    draw: Sequence[str] = study["draw"] if drawn else ()
    found = [
        Section(f"Test set: {test}", _of_test(of_test, draw), _text(test, of_test, study))
        for test, of_test in tests.items()
    ]
    if len(tests) > 1:
        found.append(Section("Across test sets", _across(tests, draw)))
    for test, models in (numbers.get("scaling") or {}).items() if drawn else ():
        title = f"Accuracy against data: {test}"
        found.append(Section(title, [figures.accuracy_by_data(models, title=title)]))
    if lengths := numbers.get("length"):
        found.append(_length(lengths, drawn))
    return found


def markdown(numbers: Numbers) -> str:
    """The tables alone, for people who read text."""
    parts = []
    for section in sections(numbers, drawn=False):
        tables = [block for block in section.blocks if isinstance(block, Table)]
        if tables:
            parts += [f"## {section.title}", *([section.text] if section.text else [])]
        for table in tables:
            lines = [table.header, ["---"] * len(table.header), *table.rows]
            parts.append("\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines))
            parts += [table.caption] if table.caption else []
    return "\n\n".join(parts) + "\n"


def _text(test: str, found: Numbers, study: Numbers) -> str:
    seeds = len(study["seeds"])
    said = [f"{found['pairs']} held-out pairs"]
    if study["trainings"] and seeds > 1:
        said.append(f"means over {seeds} training seeds")
    if left_out := study["left_out"].get(test):
        said.append(f"{left_out} pairs left out, on whose prompts a model is trained")
    for name, unread in found["unread"].items():
        said.append(f"{unread} left out that {name} cannot read")
    return "; ".join(said) + "."


def _of_test(found: Numbers, draw: Sequence[str]) -> list[Block]:
    models: Mapping[str, Numbers] = found["models"]
    drawn = {name: numbers for name, numbers in models.items() if name in draw}
    agreement = found.get("annotators")
    blocks: list[Block] = []
    if drawn:
        by_rating = {name: of["intervals"] for name, of in drawn.items()}
        blocks.append(figures.accuracy_by_rating(by_rating))
    blocks.append(_by_rating({name: of["intervals"] for name, of in models.items()}, agreement))
    if found["differences"]:
        blocks.append(_differences(found))
    if any("labels" in of for of in models.values()):
        blocks.append(_safety(models))
    if sources := {name: of["sources"] for name, of in drawn.items() if "sources" in of}:
        blocks.append(figures.accuracy_by_source(sources))
    if drawn:
        blocks.append(figures.calibration({n: of["calibration"] for n, of in drawn.items()}))
    blocks.append(_scores(models))
    if agreement:
        blocks.append(_agreement(agreement))
    return blocks


def _by_rating(models: Mapping[str, Sequence[Numbers]], agreement: Numbers | None) -> Table:
    """Table 28's shape."""
    rows = dict(models)
    if agreement:
        rows[_ANNOTATORS] = agreement["by_rating"]
    ratings = list(dict.fromkeys(row["rating"] for row in next(iter(models.values()))))
    by_rating = {name: {row["rating"]: row for row in found} for name, found in rows.items()}
    first = next(iter(models.values()))
    return Table(
        ("reward model", *(rating.replace("_", " ") for rating in ratings)),
        [
            ("pairs", *(row["pairs"] for row in first)),
            *(
                (name, *(_estimate(found.get(rating)) for rating in ratings))
                for name, found in by_rating.items()
            ),
        ],
        "Share of pairs whose chosen response scores higher, with 95 % intervals over pairs; a tie "
        "counts half.",
    )


def _differences(found: Numbers) -> Table:
    first = next(iter(found["models"]))
    return Table(
        ("reward model", f"accuracy - that of {first}", "average of each seed"),
        [
            (name, _estimate(found["differences"].get(name)), _seeds(of["intervals"][-1]))
            for name, of in found["models"].items()
        ],
        "On the same pairs, with its paired 95 % interval: one that leaves 0 out is more than the "
        "draw of the test pairs. Whether it is more than the draw of the training seed, the seeds "
        "show.",
    )


def _safety(models: Mapping[str, Numbers]) -> Table:
    """Table 29's shape, and what its recall costs."""
    labels = [
        row["rating"] for row in next(of["labels"] for of in models.values() if "labels" in of)
    ]
    return Table(
        (
            "reward model",
            *(_LABELS[label] for label in labels),
            "unsafe responses found",
            "safe ones called unsafe",
        ),
        [
            (
                name,
                *(
                    _estimate({row["rating"]: row for row in of["labels"]}.get(label))
                    for label in labels
                ),
                _estimate(of["unsafe"].get("recall")),
                _estimate(of["unsafe"].get("false_alarms")),
            )
            for name, of in models.items()
        ],
        "Accuracy by the safety label of the pair; then the share of the unsafe and of the safe "
        "responses whose score is below 0, a probability of 0.5. Only a model that is trained to "
        "classify puts the border there.",
    )


def _scores(models: Mapping[str, Numbers]) -> Table:
    return Table(
        (
            "reward model",
            "expected calibration error",
            "mean score",
            "standard deviation",
            "chosen - rejected",
        ),
        [
            (
                name,
                sum(of["errors"]) / len(of["errors"]),
                of["scores"]["mean"],
                of["scores"]["std"],
                of["scores"]["gap"],
            )
            for name, of in models.items()
        ],
        "A mean that moves from batch to batch of one model's test sets is a drift of its scores, "
        "which thresholds notice and rankings do not.",
    )


def _agreement(agreement: Numbers) -> Table:
    rows = [(f"AC{i}", agreement[f"ac{i}"]) for i in (1, 2) if f"ac{i}" in agreement]
    return Table(
        ("coefficient", "agreement", "pairs with several votes"),
        [
            (name, (found["coefficient"], found["low"], found["high"]), agreement["pairs"])
            for name, found in rows
        ],
        "Gwet's coefficients: AC1 of the choice, AC2 of choice and rating as a scale of eight with "
        "ordinal weights.",
    )


def _across(tests: Mapping[str, Numbers], draw: Sequence[str]) -> list[Block]:
    """Table 8's shape: rows are models, columns test sets."""
    names = list(next(iter(tests.values()))["models"])
    rows = {
        name: {test: found["models"][name]["intervals"][-1] for test, found in tests.items()}
        for name in names
    }
    drawn = {name: by_test for name, by_test in rows.items() if name in draw}
    table = Table(
        ("reward model", *tests),
        [(name, *(_estimate(row) for row in by_test.values())) for name, by_test in rows.items()],
        "Average accuracy. Below chance a model prefers what the annotators of that test set "
        "reject.",
    )
    if not drawn:
        return [table]
    return [figures.accuracy_by_source(drawn, title="Reward-model accuracy by test set"), table]


def _length(lengths: Numbers, drawn: bool) -> Section:
    models: Mapping[str, Numbers] = lengths["models"]
    per_prompt = {
        name: [float("nan") if r is None else r for r in of["per_prompt"]]
        for name, of in models.items()
    }
    table = Table(
        ("reward model", "mean correlation", "prompts without", "prompts unread"),
        [(name, _estimate(of), of["undefined"], of["unread"]) for name, of in models.items()],
        "Pearson correlation of score and length in tokens over the answers to one prompt, and its "
        "mean over prompts with a 95 % interval. RLHF Workflow reports 0.19 for UltraRM-13B and "
        "0.06 for its own.",
    )
    text = (
        f"{lengths['samples']} answers to each of {lengths['prompts']} prompts, "
        f"{lengths['tokens']:.0f} tokens long on average, {100 * lengths['cut_share']:.1f} % cut "
        "by the length limit (which score as if they ended there)."
    )
    figure = [figures.length_correlation(per_prompt)] if drawn else []
    return Section("Length bias", [*figure, table], text)


def _seeds(row: Numbers) -> str:
    return ", ".join(f"{share:.3f}" for share in row["by_seed"])


def _estimate(value: Numbers | None) -> object:
    if value is None or value["mean"] is None:
        return None
    return value["mean"], value["low"], value["high"]
