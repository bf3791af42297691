"""Figures about models and versions: what the reward models know and what RLHF changed.

Each function takes plain numbers (this room may not import the ones that compute them) and gives
a `Plot`. An estimate arrives as (mean, low, high). Nothing to draw is legal everywhere and says so
on the figure: a run that has not got there yet still has a report.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llama2rt.report.plot import INK, MARKERS, MUTED, RAMP, SERIES, Plot, canvas, nothing, percent

Estimate = tuple[float, float, float]
"""(mean, low, high): a value and the ends of its 95 % interval."""
_QUARTERS = (0.25, 0.5, 0.75)


def accuracy_by_rating(
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str = "Reward-model accuracy by rating",
) -> Plot:
    """Bars of held-out accuracy, grouped by rating, one colour a reward model (Llama 2, Table 8).

    models: name -> rows {rating, mean, low, high, pairs, ties} as `preference.accuracy_table`
    gives them, shares in [0, 1].
    """
    ratings = list(dict.fromkeys(str(row["rating"]) for rows in models.values() for row in rows))
    # The average stands apart: it is not a rating.
    places = np.array([j + 0.3 * (rating == "average") for j, rating in enumerate(ratings)])
    with canvas(height=3.4) as (figure, (axes,)):
        if not ratings:
            nothing(axes)
        width = 0.8 / max(1, len(models))
        for i, (name, rows) in enumerate(models.items()):
            by_rating = {str(row["rating"]): row for row in rows}
            kept = [j for j, rating in enumerate(ratings) if rating in by_rating]
            x = places[kept] + (i - (len(models) - 1) / 2) * width
            mean, low, high = _estimates([_triple(by_rating[ratings[j]]) for j in kept])
            axes.bar(x, mean, width * 0.88, color=SERIES[i], alpha=0.85, label=name)
            axes.errorbar(x, mean, _bars(mean, low, high), fmt="none", ecolor=INK, elinewidth=1.1)
            for place, value, top in zip(x, mean, high, strict=True):
                _note(axes, f"{100 * value:.0f}", (place, top), (0, 3), ha="center")
        if ratings:
            axes.axhline(0.5, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            right_end = {"xycoords": ("axes fraction", "data"), "va": "center", "color": MUTED}
            _note(axes, "chance", (1.0, 0.5), (2, 0), **right_end)
            axes.set_xticks(places, [rating.replace("_", " ") for rating in ratings])
            axes.set_ylim(0, 1.08)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
            axes.yaxis.set_major_formatter(percent())
            axes.set_ylabel("pairs ranked as annotated")
            axes.grid(axis="x", visible=False)
            _legend(figure, axes)
    return Plot(
        figure,
        title,
        "Share of held-out pairs whose chosen response scores higher, with 95 % intervals; it "
        "should rise from right to left, as annotators grow surer, and stay above chance (50 %).",
        ("reward model", "rating", "accuracy", "pairs", "ties"),
        [
            (name, str(row["rating"]).replace("_", " "), _triple(row), row["pairs"], row["ties"])
            for name, rows in models.items()
            for row in rows
        ],
    )


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
            mean, low, high = _estimates(estimates)
            y = np.arange(len(names))
            axes.errorbar(
                mean,
                y,
                xerr=_bars(mean, low, high),
                fmt="o",
                markersize=6.5,
                color=colour,
                elinewidth=2,
                clip_on=False,  # a dot at 0 is a whole dot
                zorder=3,
            )
            for place, value, right in zip(y, mean, high, strict=True):
                shown = f"{100 * value:.1f} %" if share else f"{value:.3f}"
                _note(axes, shown, (right, place), (6, 0), va="center")
            axes.set_yticks(y, names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            limit = float(np.nanmax(high))
            # Room for the number right of the interval; no 110 % on the axis.
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
            _legend(figure, axes)
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
            _legend(figure, panels[0])
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


def reward_distribution(
    rewards: Mapping[str, ArrayLike],
    *,
    label: str = "reward",
    title: str = "Reward distribution by version",
) -> Plot:
    """How the rewards of each version's answers spread, drawn as violins with quartiles.

    rewards: name -> scores [answers].
    """
    data = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in rewards.items()}
    with canvas(height=0.9 + 0.55 * max(2, len(data))) as (figure, (axes,)):
        if not data:
            nothing(axes)
        for i, values in enumerate(data.values()):
            colour = SERIES[i % len(SERIES)]
            if not len(values):
                continue
            parts = axes.violinplot(
                [values], [i], orientation="horizontal", widths=0.82, showextrema=False
            )
            for body in parts["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=colour, alpha=0.3, edgecolor=colour)
            low, middle, high = np.quantile(values, _QUARTERS)
            axes.plot([low, high], [i, i], color=colour, linewidth=4, solid_capstyle="butt")
            axes.plot(middle, i, "o", color=INK, markersize=5.5)
        if data:
            axes.set_yticks(range(len(data)), list(data))
            axes.set_ylim(len(data) - 0.4, -0.6)
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
    return Plot(
        figure,
        title,
        "Width shows how many answers got a reward, the thick line holds the middle half, the dot "
        "is the median; a second hump is a group of answers the model treats differently.",
        ("version", "answers", "mean", "quartile 1", "median", "quartile 3"),
        [
            (name, len(values), float(values.mean()), *map(float, np.quantile(values, _QUARTERS)))
            for name, values in data.items()
            if len(values)
        ],
    )


def length_correlation(
    per_prompt: Mapping[str, ArrayLike],
    *,
    title: str = "Reward-length correlation",
) -> Plot:
    """Heat map of per-prompt Pearson correlations, one row a reward model or version.

    per_prompt: name -> correlations [prompts], NaN where undefined (as `length.correlation`
    gives them). After RLHF Workflow (Dong et al., 2024).
    """
    data = {name: np.asarray(values, dtype=np.float64) for name, values in per_prompt.items()}
    defined = {name: np.sort(values[np.isfinite(values)]) for name, values in data.items()}
    with canvas(height=1.15 + 0.5 * max(1, len(data))) as (figure, (axes,)):
        if not any(len(values) for values in defined.values()):
            nothing(axes, "no prompt with a defined correlation")
        else:
            scale = ScalarMappable(Normalize(-1, 1), "RdBu_r")
            for i, values in enumerate(defined.values()):
                if not len(values):
                    axes.text(0.5, i, "undefined", ha="center", va="center", color=MUTED)
                    continue
                # At most 120 cells a row: sorted values lose nothing by averaging neighbours. Each
                # reaches to the right end, under its successors, so that no seams show.
                cells = [part.mean() for part in np.array_split(values, min(120, len(values)))]
                left = np.arange(len(cells)) / len(cells)
                axes.barh(i, 1 - left, 0.76, left, color=scale.to_rgba(np.array(cells)))
                mean = f"mean {values.mean():+.2f}".replace("-", "\N{MINUS SIGN}")
                _note(axes, mean, (1, i), (8, 0), va="center")
            figure.colorbar(scale, ax=axes, label="Pearson r", pad=0.1, ticks=[-1, 0, 1])
            axes.set_yticks(range(len(data)), list(data))
            axes.set_ylim(len(data) - 0.5, -0.5)
            axes.set_xlim(0, 1)
            axes.set_xticks([0, 0.5, 1])
            axes.xaxis.set_major_formatter(percent())
            axes.set_xlabel("prompts, sorted by their correlation")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
    return Plot(
        figure,
        title,
        "Each cell is a prompt: red where longer samples score higher, blue where shorter ones do; "
        "a row that is mostly red is a reward that pays for length. Prompts whose samples all "
        "have the same reward or length have no correlation and are left out.",
        ("row", "prompts", "undefined", "mean r"),
        [
            (
                name,
                len(values),
                len(values) - len(defined[name]),
                float(defined[name].mean()) if len(defined[name]) else None,
            )
            for name, values in data.items()
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


def _estimates(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.asarray(estimates, dtype=np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.clip(np.stack([mean - low, high - mean]), 0, None)


def _triple(row: Mapping[str, Any]) -> Estimate:
    return row["mean"], row["low"], row["high"]


def _note(
    axes: Axes, text: str, at: tuple[Any, Any], offset: tuple[float, float], **style: Any
) -> None:
    """Small text, `offset` points from a place on the axes."""
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=8.5, **style)


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, where it can never cover a line."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(6, len(labels)),
        columnspacing=1.6,
        handlelength=2.8,
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
