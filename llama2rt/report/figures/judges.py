"""Figures of versions as judges see them: two axes for each judge, and a radar of tasks."""

from collections.abc import Mapping, Sequence

import numpy as np

from llama2rt.report.figures.marks import Estimate, bars, columns, legend, note
from llama2rt.report.plot import GRID, MARKERS, MUTED, SERIES, Plot, canvas, nothing, percent

_EVEN = 0.5
Axes2 = tuple[Estimate | None, Estimate | None]
"""win rates in helpfulness and in harmlessness"""


def two_sides(
    judges: Mapping[str, Mapping[str, Axes2]],
    against: str,
    *,
    title: str = "Win rates by each judge",
) -> Plot:
    """Helpfulness and harmlessness of each version against one opponent, a panel a judge (Llama 2,
    Fig. 11). judges: judge -> version -> win rates in [0, 1]; a version without both is not drawn.
    """
    drawn = {
        judge: {name: (x, y) for name, (x, y) in found.items() if x is not None and y is not None}
        for judge, found in judges.items()
    }
    drawn = {judge: found for judge, found in drawn.items() if found}
    with canvas(1, max(1, len(drawn)), height=4.2, sharey=True) as (figure, panels):
        if not drawn:
            nothing(panels[0], "no safety prompts, or no helpfulness prompts")
        names = list(dict.fromkeys(name for found in drawn.values() for name in found))
        for axes, (judge, found) in zip(panels, drawn.items(), strict=False):
            (x, *x_ends), (y, *y_ends) = (
                columns(side) for side in zip(*found.values(), strict=True)
            )
            axes.plot(x, y, color=MUTED, linewidth=1, zorder=1)
            across, up = bars(x, *x_ends), bars(y, *y_ends)
            for i, name in enumerate(found):
                which = names.index(name)
                axes.errorbar(
                    x[i],
                    y[i],
                    xerr=across[:, i : i + 1],
                    yerr=up[:, i : i + 1],
                    fmt=MARKERS[which % len(MARKERS)],
                    color=SERIES[which % len(SERIES)],
                    label=name,
                    clip_on=False,  # a version that wins everything stands on the frame
                )
            axes.axvline(_EVEN, color=MUTED, linestyle=(0, (4, 2)), linewidth=1)
            axes.axhline(_EVEN, color=MUTED, linestyle=(0, (4, 2)), linewidth=1)
            axes.set_title(judge)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.xaxis.set_major_formatter(percent())
            axes.yaxis.set_major_formatter(percent())
            axes.set_xlabel("helpfulness prompts won")
        if drawn:
            panels[0].set_ylabel("safety prompts won")
            legend(figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    return Plot(
        figure,
        title,
        f"Each version against {against}, ties half; the line joins them in order. Right and up is "
        "better, the dashed lines are even; where the judges disagree about the direction, trust "
        "the one that no version was trained on.",
        ("judge", "version", "helpfulness", "harmlessness"),
        [(judge, name, x, y) for judge, found in judges.items() for name, (x, y) in found.items()],
    )


def radar(
    tasks: Sequence[str],
    scores: Mapping[str, Sequence[float | None]],
    *,
    title: str = "Tasks",
) -> Plot:
    """Scores in [0, 1] of each version on every task, one spoke a task; a task that a version lacks
    leaves a gap in its line."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(tasks)) / max(1, len(tasks))
    with canvas(width=6.4, height=5.2) as (figure, (axes,)):
        axes.set_axis_off()
        axes.set_aspect("equal")
        if not tasks:
            nothing(axes)
        round_ = np.linspace(0, 2 * np.pi, 200)
        for ring in (0.25, 0.5, 0.75, 1.0) if tasks else ():
            axes.plot(ring * np.cos(round_), ring * np.sin(round_), color=GRID, linewidth=0.8)
            note(axes, f"{100 * ring:.0f} %", (0, ring), (2, 1), color=MUTED)
        for angle, task in zip(angles, tasks, strict=True):
            x, y = np.cos(angle), np.sin(angle)
            axes.plot([0, x], [0, y], color=GRID, linewidth=0.8)
            side = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
            axes.text(1.1 * x, 1.1 * y, task, ha=side, va="center")
        for i, (name, values) in enumerate(scores.items()):
            length = np.array([np.nan if value is None else value for value in values], float)
            x, y = length * np.cos(angles), length * np.sin(angles)
            closed = (np.append(x, x[:1]), np.append(y, y[:1]))
            style = {"marker": MARKERS[i % len(MARKERS)], "color": SERIES[i % len(SERIES)]}
            axes.plot(*closed, label=name, linewidth=1.5, **style)  # type: ignore[arg-type]
        if tasks:
            axes.set_xlim(-1.6, 1.6)
            axes.set_ylim(-1.25, 1.25)
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "The further out, the better; a version that gains in chat and loses here pays an "
        "alignment tax.",
        ("version", *tasks),
        [(name, *values) for name, values in scores.items()],
    )
