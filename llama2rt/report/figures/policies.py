"""Figures of the policies: how helpful and safe each version is, and what more samples gain."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike

from llama2rt.report.figures.marks import Estimate, bars, columns, legend, note
from llama2rt.report.plot import MARKERS, RAMP, SERIES, Plot, canvas, nothing, percent

# Not clipped: a dot at 0 is a whole dot.
_DOTS: dict[str, Any] = {
    "fmt": "o",
    "markersize": 6.5,
    "elinewidth": 2,
    "clip_on": False,
    "zorder": 3,
}


def versions(
    names: Sequence[str],
    helpfulness: Sequence[Estimate],
    unsafe: Sequence[Estimate],
    *,
    title: str = "From SFT to the last version",
) -> Plot:
    """Mean helpfulness and share of unsafe answers per version, with intervals, side by side.

    helpfulness: in [0, 1], as a judge gives it; unsafe: shares in [0, 1]; one entry per name.
    """
    with canvas(1, 2, height=0.9 + 0.42 * max(3, len(names)), sharey=True) as (figure, both):
        panels = (
            (both[0], helpfulness, "mean helpfulness (0 to 1)", SERIES[0], False),
            (both[1], unsafe, "unsafe answers", SERIES[1], True),
        )
        for axes, estimates, label, colour, share in panels:
            if not len(names):
                nothing(axes)
                continue
            mean, low, high = columns(estimates)
            y = np.arange(len(names))
            axes.errorbar(mean, y, xerr=bars(mean, low, high), color=colour, **_DOTS)
            for row, value, right in zip(y, mean, high, strict=True):
                shown = f"{100 * value:.1f} %" if share else f"{value:.3f}"
                note(axes, shown, (right, row), (6, 0), va="center")
            axes.set_yticks(y, names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            limit = float(np.nanmax(high))
            # Space for the number right of the interval; no 110 % on the axis.
            axes.set_xlim(0, max(0.05, limit) * 1.2)
            axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1])
            axes.set_xlim(0, max(0.05, limit) * 1.2)
            if share:
                axes.xaxis.set_major_formatter(percent())
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
    return Plot(
        figure,
        title,
        "Dots are means over held-out prompts, lines their 95 % intervals; helpfulness should move "
        "right and unsafe answers left, and lines that do not overlap are a clear difference.",
        ("version", "helpfulness", "unsafe"),
        [
            (name, tuple(helpful), tuple(harm))
            for name, helpful, harm in zip(names, helpfulness, unsafe, strict=True)
        ],
    )


def win_matrix(
    names: Sequence[str], rates: ArrayLike, *, title: str = "Win rates between versions"
) -> Plot:
    """Win rate of each version (row) over each other (column) as a heat map with numbers.

    rates: [V, V] in [0, 1], NaN for pairs that did not meet (the diagonal).
    """
    table = np.asarray(rates, dtype=np.float64).reshape(len(names), len(names))
    side = 1.6 + 0.55 * max(2, len(names))
    with canvas(width=min(9.2, side * 1.75), height=side) as (figure, (axes,)):
        if not len(names):
            nothing(axes)
        else:
            mesh = axes.pcolormesh(
                np.ma.masked_invalid(table), cmap="BrBG", vmin=0, vmax=1, linewidth=0
            )
            for (i, j), rate in np.ndenumerate(table):
                if np.isfinite(rate):
                    axes.text(
                        j + 0.5,
                        i + 0.5,
                        f"{100 * rate:.0f}",
                        ha="center",
                        va="center",
                        color=_readable(mesh.to_rgba(np.array([rate]))[0]),
                    )
            ticks = np.arange(len(names)) + 0.5
            long = max(map(len, names)) > 8
            axes.set_xticks(ticks, names, rotation=30 * long, ha="right" if long else "center")
            axes.set_yticks(ticks, names)
            axes.set_ylim(len(names), 0)
            axes.set_aspect("equal")
            axes.set_xlabel("against")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            bar = figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], format=percent())
            bar.set_label("prompts won by the row")
            bar.outline.set_visible(False)
    return Plot(
        figure,
        title,
        "Per cent of held-out prompts on which the row's answer beats the column's, ties counted "
        "half; later rows should win against earlier columns.",
        ("version", *names),
        [
            (name, *(float(rate) if np.isfinite(rate) else None for rate in row))
            for name, row in zip(names, table, strict=True)
        ],
    )


def best_of_n(
    policies: Mapping[str, Mapping[str, Sequence[Any]]],
    *,
    title: str = "Max and median reward among N samples",
) -> Plot:
    """Expected max (solid) and median (dashed) reward against N (Llama 2, Fig. 7).

    policies: name -> {"n", "max", "median"} as `best_of.curves` gives them.
    """
    with canvas() as (figure, (axes,)):
        if not policies:
            nothing(axes)
        for i, (name, curve) in enumerate(policies.items()):
            colour = SERIES[i % len(SERIES)]
            axes.plot(
                curve["n"],
                curve["max"],
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markevery=_powers(curve["n"]),
                label=f"{name}, max",
            )
            axes.plot(
                curve["n"],
                curve["median"],
                color=colour,
                linestyle=(0, (4, 2)),
                label=f"{name}, median",
            )
            if len(policies) == 1:
                axes.fill_between(
                    curve["n"], curve["median"], curve["max"], color=colour, alpha=0.12, linewidth=0
                )
        if policies:
            _samples_axis(axes, [n for curve in policies.values() for n in curve["n"]])
            axes.set_ylabel("reward (mean over prompts)")
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "The gap between a solid line and its dashed one is what picking the best of N samples can "
        "gain; a max that has flattened says more samples will not help.",
        ("policy", "N", "max", "median"),
        [
            (name, n, best, middle)
            for name, curve in policies.items()
            for n, best, middle in _sparse(
                list(zip(curve["n"], curve["max"], curve["median"], strict=True))
            )
        ],
    )


def temperatures(
    policies: Mapping[str, Mapping[float, Mapping[str, Sequence[Any]]]],
    *,
    title: str = "Max reward against N, by temperature",
) -> Plot:
    """Expected max reward against N at several temperatures, one panel a policy (Llama 2, Fig. 8).

    policies: name -> temperature -> {"n", "max", ...} as `best_of.curves` gives them.
    """
    every = sorted({t for curves in policies.values() for t in curves})
    shade = Normalize(0, max(1, len(every) - 1))
    with canvas(1, max(1, len(policies)), height=3.4, sharey=True) as (figure, panels):
        if not every:
            for axes in panels:
                nothing(axes)
        for axes, (name, curves) in zip(panels, policies.items(), strict=False):
            for i, temperature in enumerate(every):
                if temperature not in curves:
                    continue
                curve = curves[temperature]
                axes.plot(
                    curve["n"],
                    curve["max"],
                    color=RAMP(shade(i)),
                    marker=MARKERS[i % len(MARKERS)],
                    markevery=_powers(curve["n"]),
                    label=f"T = {temperature:g}",
                )
            axes.set_title(name)
            _samples_axis(axes, [n for curve in curves.values() for n in curve["n"]])
        if every:
            panels[0].set_ylabel("max reward (mean over prompts)")
            legend(figure, panels[0])
    return Plot(
        figure,
        title,
        "Each line is one sampling temperature; the highest line at the N you can afford is the "
        "temperature to sample at, and it may change from one version to the next.",
        ("policy", "temperature", "N", "max"),
        [
            (name, temperature, n, best)
            for name, curves in policies.items()
            for temperature, curve in sorted(curves.items())
            for n, best in _sparse(list(zip(curve["n"], curve["max"], strict=True)), 6)
        ],
    )


def _samples_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    largest = max(sizes, default=1)
    ticks = [1 << power for power in range(int(largest).bit_length())]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.93, max(2, largest) * 1.08)
    axes.set_xlabel("number of samples N")


def _powers(sizes: Sequence[int]) -> list[int]:
    """Indices of the powers of two: where the axis has its ticks, the lines have their markers."""
    return [i for i, n in enumerate(sizes) if n & (n - 1) == 0]


def _sparse(rows: list, most: int = 10) -> list:
    """At most `most` rows, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[i] for i in np.unique(np.geomspace(1, len(rows), most).astype(int) - 1)]


def _readable(colour: np.ndarray) -> str:
    red, green, blue = colour[:3]
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
