"""The sections of a run that taught a model to keep to an instruction, from its summary."""

from collections.abc import Mapping
from typing import Any

from llama2rt.report import figures
from llama2rt.report.html import Block, Section, Table

RECALL = "Recall over turns"
ATTENTION = "Attention to the instruction"
NAMES = {"without": "without Ghost Attention", "with": "with Ghost Attention"}


def sections(summary: Mapping[str, Any]) -> list[Section]:
    """Those of `recall` (name -> `evaluate.recall.table`) and `attention` (name ->
    `evaluate.attention.of_dialogue`), where there are any; the run's two models by their names in
    full."""
    found = []
    if recall := _named(summary.get("recall") or {}):
        found.append(Section(RECALL, _recall(recall)))
    if maps := _named(summary.get("attention") or {}):
        blocks: list[Block] = [figures.attention_maps(maps), figures.attention_by_turn(maps)]
        note = "One held-out dialogue, the same text for both, answered as the instruction asks."
        found.append(Section(ATTENTION, blocks, note))
    return found


def _named(models: Mapping[str, Any]) -> dict[str, Any]:
    return {NAMES.get(name, name): found for name, found in models.items() if found}


def _recall(models: Mapping[str, Any]) -> list[Block]:
    rows: list[list[object]] = []
    for name, found in models.items():
        for row in found["turns"]:
            shares = {"all of it": row, **row["attributes"]}
            rows += [
                [name, row["turn"], what, share["dialogues"], _triple(share)]
                for what, share in shares.items()
            ]
    ended = [
        f"{name}: {count} dialogues ended early ({why})"
        for name, found in models.items()
        for why, count in found["ended"].items()
    ]
    caption = (
        "Share of answers that follow what only the first turn says, among the model's own earlier "
        "answers, by the rules of the instructions' file, with 95 % intervals. "
    ) + "; ".join(ended)
    by_turn = {
        name: [(row["turn"], _triple(row)) for row in found["turns"]]
        for name, found in models.items()
    }
    header = ["model", "turn", "instruction", "dialogues", "followed"]
    return [figures.recall(by_turn), Table(header, rows, caption)]


def _triple(share: Mapping[str, float]) -> tuple[float, float, float]:
    return share["mean"], share["low"], share["high"]
