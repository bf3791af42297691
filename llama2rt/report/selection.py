"""The sections of rejection sampling and of distillation: what was drawn, what was chosen, who
learned from it. From the numbers that `stages.selection`, `stages.tuning` and `stages.distill` put
into a run's summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama2rt.report import figures
from llama2rt.report.html import Block, Section, Table

SELECTION = "What was chosen"
TEMPERATURE = "Temperature"
STUDENTS = "Students"


def sections(numbers: Mapping[str, Any]) -> list[Section]:
    """The sections that `numbers` call for: any of `selection` with `curves`, `tuning` and
    `students`; other keys are left alone."""
    found = []
    if "students" in numbers:
        found.append(_students(numbers["students"]))
    if "tuning" in numbers:
        found.append(_temperature(numbers["tuning"]))
    if "selection" in numbers:
        found.append(_selection(numbers))
    return found


def _temperature(tuning: Mapping[str, Any]) -> Section:
    rows = tuning["temperatures"]
    chosen = tuning["temperature"]
    blocks: list[Block] = []
    if tuning["samples"] > 1:
        blocks.append(
            figures.temperatures({"policy": {r["temperature"]: r["curve"] for r in rows}})
        )
    blocks.append(
        Table(
            ("temperature", f"best of {tuning['n']}", "chosen better by", "cut"),
            [
                (f"{r['temperature']:g}", _cell(r["best"]), _cell(r["behind"]), f"{r['cut']:.1%}")
                for r in rows
            ],
            f"Expected largest reward among {tuning['n']} answers, of {tuning['samples']} to each "
            f"of {tuning['prompts']} prompts, with 95 % intervals over prompts; an answer that "
            "cannot become a target counts as the worst of its prompt.",
        )
    )
    text = f"Sampled at {chosen:g}, where the best of {tuning['n']} answers earns most."
    open_ones = [r for r in rows if r["behind"] and r["behind"]["low"] <= 0]
    if open_ones:
        names = ", ".join(f"{r['temperature']:g}" for r in open_ones)
        text += f" Not told apart from it on these prompts: {names}."
    return Section(TEMPERATURE, blocks, text)


def _selection(numbers: Mapping[str, Any]) -> Section:
    curves = numbers["curves"]
    blocks: list[Block] = []
    if len(curves["n"]) > 1:
        blocks.append(figures.best_of_n({"policy": curves}))
    header = (
        "answers",
        "number",
        "reward",
        "median",
        "tokens",
        "distinct-1",
        "distinct-2",
        "distinct-3",
        "self-BLEU",
    )
    rows = [
        (
            row["name"],
            row["responses"],
            _cell(row.get("reward")),
            row.get("median_reward"),
            _cell(row.get("tokens")),
            *(row[key] for key in ("distinct_1", "distinct_2", "distinct_3", "self_bleu")),
        )
        for row in numbers["selection"]
    ]
    blocks.append(
        Table(
            header,
            rows,
            "One answer a prompt: the policy's first, the best that can be a target, and, of a "
            "pool, the better of that and earlier versions' best. distinct-n: share of different "
            "n-grams; self-BLEU: likeness to each other, 1 for copies.",
        )
    )
    if "pooled" in numbers:
        blocks.append(
            Table(("policy", "answers"), [*numbers["pooled"].items()], "Whose answers were kept.")
        )
    cut = numbers["best_cut"]
    text = (
        f"Of {cut['mean']:.1%} of the prompts the highest reward is that of an answer that was cut."
    )
    return Section(SELECTION, blocks, text)


def _students(students: Sequence[Mapping[str, Any]]) -> Section:
    header = ("student", "parameters", "from", "trained on", "batch", "lr", "steps", "loss")
    rows = [
        [student[key] for key in ("name", "parameters", "init", "read_as")]
        + [student[key] for key in ("batch_size", "lr", "steps", "loss")]
        for student in students
    ]
    caption = "One set of samples for all. loss: nats a token of the last logged step."
    return Section(STUDENTS, [Table(header, rows, caption)])


def _cell(value: Mapping[str, Any] | None) -> object:
    return None if value is None else (value["mean"], value["low"], value["high"])
