"""Figures of a row of versions: any estimate of each, what its reward cost, whether it was real."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llama2rt.report.figures.marks import Estimate, bars, columns, legend, note
from llama2rt.report.plot import MARKERS, SERIES, Plot, canvas, nothing, percent


@dataclass(frozen=True)
class Panel:
    """One estimate a version; None where a version has none."""

    label: str
    estimates: Sequence[Estimate | None]
    share: bool = False
    """Drawn in per cent; the values lie in [0, 1]."""


_A_ROW = 3  # panels side by side


def by_version(
    names: Sequence[str],
    panels: Sequence[Panel],
    *,
    title: str = "Versions, first to last",
    name: str = "version",
    over: str = "held-out prompts",
) -> Plot:
    """Estimates of each version with their intervals, one panel an estimate. `name`: what the rows
    are, `over`: what the means are over."""
    drawn = [panel for panel in panels if any(panel.estimates)]
    across = min(_A_ROW, max(1, len(drawn)))
    down = max(1, -(-len(drawn) // across))
    height = down * (0.9 + 0.36 * max(3, len(names)))
    with canvas(down, across, height=height, sharey=True) as (figure, grid):
        if not drawn:
            nothing(grid[0])
        for i, (axes, panel) in enumerate(zip(grid, drawn, strict=False)):
            _panel(axes, names, panel, SERIES[i % len(SERIES)])
        for axes in grid[max(1, len(drawn)) :]:
            axes.set_axis_off()
    return Plot(
        figure,
        title,
        f"Dots are means over {over}, lines their 95 % intervals; lines that do not overlap are a "
        "clear difference.",
        (name, *(panel.label for panel in drawn)),
        [(row, *(panel.estimates[i] for panel in drawn)) for i, row in enumerate(names) if drawn],
    )


def _panel(axes: Axes, names: Sequence[str], panel: Panel, colour: str) -> None:
    kept = [i for i, estimate in enumerate(panel.estimates) if estimate is not None]
    mean, low, high = columns([e for e in panel.estimates if e is not None])
    axes.errorbar(
        mean, kept, xerr=bars(mean, low, high), color=colour, fmt="o", markersize=6, elinewidth=2
    )
    # Space for the number right of the interval.
    left, right = float(low.min()), float(high.max())
    width = (right - left) or (0.1 if panel.share else max(abs(right), 1.0))
    axes.set_xlim(left - 0.1 * width, right + 0.45 * width)
    # Three digits of the largest, so that a panel's numbers look alike.
    decimals = max(0, 3 - len(str(int(np.abs(mean).max())).lstrip("0")))
    for row, value, end in zip(kept, mean, high, strict=True):
        shown = f"{100 * value:.1f} %" if panel.share else f"{value:.{decimals}f}"
        note(axes, shown.replace("-", "\N{MINUS SIGN}"), (end, row), (5, 0), va="center")
    if panel.share:
        axes.xaxis.set_major_formatter(percent())
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(panel.label)
    axes.grid(axis="y", visible=False)


def reward_by_kl(
    names: Sequence[str],
    kl: Sequence[Estimate],
    reward: Sequence[Estimate],
    *,
    title: str = "Reward of each version against its KL",
) -> Plot:
    """Mean reward against KL to the reference policy (nats a response), one point a version."""
    with canvas(height=3.4) as (figure, (axes,)):
        if not len(names):
            nothing(axes)
        else:
            (x, *x_ends), (y, *y_ends) = columns(kl), columns(reward)
            across, up = bars(x, *x_ends), bars(y, *y_ends)
            for i, name in enumerate(names):
                style: dict[str, Any] = {
                    "fmt": MARKERS[i % len(MARKERS)],
                    "color": SERIES[i % len(SERIES)],
                    "markersize": 6.5,
                    "elinewidth": 1.4,
                }
                ends: dict[str, Any] = {"xerr": across[:, i : i + 1], "yerr": up[:, i : i + 1]}
                axes.errorbar(x[i], y[i], **ends, label=name, **style)
            axes.margins(0.08)
            axes.set_xlabel("KL to the reference policy (nats a response)")
            axes.set_ylabel("mean reward")
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "Up is more reward, right is further from the reference policy: of two versions with the "
        "same reward the left one paid less for it, and KL without reward is drift.",
        ("version", "KL", "reward"),
        list(zip(names, map(tuple, kl), map(tuple, reward), strict=True)),
    )


def reward_against_judge(
    kinds: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    *,
    label: str = "judge's worth",
    title: str = "Reward against the judge",
) -> Plot:
    """The judge's worth by quantiles of reward: one panel a kind of prompt, one line a version.

    kinds: kind -> version -> bins {reward, mean, low, high, responses} as
    `over_optimisation.reward_against_judge` gives them, by rising reward.
    """
    drawn = {kind: versions for kind, versions in kinds.items() if any(versions.values())}
    with canvas(1, max(1, len(drawn)), height=3.6) as (figure, panels):
        if not drawn:
            nothing(panels[0])
        for axes, (kind, versions) in zip(panels, drawn.items(), strict=False):
            for i, (name, rows) in enumerate(versions.items()):
                colour = SERIES[i % len(SERIES)]
                x = [row["reward"] for row in rows]
                mean, low, high = columns([(row["mean"], row["low"], row["high"]) for row in rows])
                axes.plot(x, mean, color=colour, marker=MARKERS[i % len(MARKERS)], label=name)
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
                if len(rows) == 1:  # a band of one point has no area
                    axes.errorbar(x, mean, bars(mean, low, high), fmt="none", ecolor=colour)
            axes.margins(x=0.03)
            axes.set_xlabel("reward (mean of the bin)")
            axes.set_title(f"{kind} prompts")
        if drawn:
            panels[0].set_ylabel(label)
            legend(figure, panels[0])
    return Plot(
        figure,
        title,
        "Each point holds about a tenth of a version's responses, by rising reward, the band is "
        "the 95 % interval. A line should rise to its right end; where it falls there, the highest "
        "rewards are no longer the best responses: the policy has over-optimised its reward.",
        ("prompts", "version", "reward", label, "responses"),
        [
            (kind, name, row["reward"], (row["mean"], row["low"], row["high"]), row["responses"])
            for kind, versions in drawn.items()
            for name, rows in versions.items()
            for row in rows
        ],
    )
