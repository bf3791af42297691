"""Figures of instructions that are to hold: recall by turn, and Llama 2's Figure 9."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama2rt.report.figures.marks import Estimate, columns, legend
from llama2rt.report.plot import MARKERS, MUTED, RAMP, SERIES, Plot, canvas, nothing, percent


def recall(
    models: Mapping[str, Sequence[tuple[int, Estimate]]],
    *,
    title: str = "Answers that follow the first turn's instruction",
) -> Plot:
    """Share of answers that follow, by turn, with intervals; one line a model."""
    with canvas(height=3.4) as (figure, (axes,)):
        if not any(models.values()):
            nothing(axes)
        for i, (name, points) in enumerate(models.items()):
            turns = [turn for turn, _ in points]
            mean, low, high = columns([estimate for _, estimate in points])
            colour = SERIES[i % len(SERIES)]
            axes.plot(turns, mean, color=colour, marker=MARKERS[i % len(MARKERS)], label=name)
            axes.fill_between(turns, low, high, color=colour, alpha=0.15, linewidth=0)
        if any(models.values()):
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(percent())
            axes.set_xticks(sorted({turn for points in models.values() for turn, _ in points}))
            axes.set_xlabel("turn")
            axes.set_ylabel("answers that follow")
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "The instruction stands in the first turn alone: a line that falls is a model that forgets "
        "it. Bands are 95 % intervals over dialogues.",
        ("model", "turn", "answers that follow"),
        [(name, turn, estimate) for name, points in models.items() for turn, estimate in points],
    )


def attention_maps(
    models: Mapping[str, Mapping[str, Any]], *, title: str = "Largest attention weights (Figure 9)"
) -> Plot:
    """Of each model a map of `bins` [B, B] (a later token's bin by an earlier one's) of a dialogue
    of so many `tokens`, in which `instruction` [begin, end) is marked."""
    with canvas(1, max(1, len(models)), height=4.2, sharey=True) as (figure, panels):
        if not models:
            nothing(panels[0])
        for axes, (name, found) in zip(panels, models.items(), strict=False):
            bins = np.asarray(found["bins"], dtype=np.float64)
            above = np.triu(np.ones_like(bins, dtype=bool), 1)
            tokens = found["tokens"]
            drawn = axes.imshow(
                np.ma.array(bins, mask=above),
                cmap=RAMP,
                vmin=0,
                vmax=1,
                extent=(0, tokens, tokens, 0),
                interpolation="nearest",
            )
            for edge in found["instruction"]:
                axes.axvline(edge, color=MUTED, linewidth=0.8, linestyle=":")
            axes.grid(visible=False)
            axes.set_title(name)
            axes.set_xlabel("token attended to")
        if models:
            panels[0].set_ylabel("token that attends")
            figure.colorbar(drawn, ax=panels, label="largest weight", shrink=0.8)
    return Plot(
        figure,
        title,
        "Each square is the largest weight over all layers and heads between two bins of tokens. "
        "The dotted lines enclose the instruction: that column stays warm as far down as later "
        "tokens still look at it.",
        ("model", "bin", "largest weight of the bin to the instruction's bins"),
        [
            (name, row, float(weight))
            for name, found in models.items()
            for row, weight in enumerate(_to_instruction(found))
        ],
    )


def _to_instruction(found: Mapping[str, Any]) -> np.ndarray:
    """[B]: the largest weight of each row's bin to the bins that the instruction is in."""
    bins = np.asarray(found["bins"], dtype=np.float64)
    begin, end = found["instruction"]
    first, last = (position * len(bins) // found["tokens"] for position in (begin, end - 1))
    largest: np.ndarray = bins[:, first : last + 1].max(axis=1)
    return largest


def attention_by_turn(
    models: Mapping[str, Mapping[str, Any]],
    *,
    title: str = "Attention of each answer to the instruction",
) -> Plot:
    """The `turns` of each model: the largest weight, over layers and heads, to the instruction,
    mean over an answer's tokens."""
    with canvas(height=3.2) as (figure, (axes,)):
        if not models:
            nothing(axes)
        for i, (name, found) in enumerate(models.items()):
            turns = range(1, len(found["turns"]) + 1)
            style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(turns, found["turns"], label=name, **style)
        if models:
            axes.set_ylim(bottom=0)
            axes.set_xlabel("turn")
            axes.set_ylabel("largest weight")
            axes.locator_params(axis="x", integer=True)
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "How strongly the tokens of each answer still look at the instruction in the first turn.",
        ("model", "turn", "largest weight to the instruction"),
        [
            (name, turn, weight)
            for name, found in models.items()
            for turn, weight in enumerate(found["turns"], start=1)
        ],
    )
