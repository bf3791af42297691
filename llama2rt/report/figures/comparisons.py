"""Figures of a reward model on held-out comparisons: where it ranks well, how sure it may be, how
long what it learned stays true."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llama2rt.report.figures.marks import Estimate, bars, columns, legend, note
from llama2rt.report.plot import MARKERS, MUTED, SERIES, Plot, canvas, nothing, percent

Row = Mapping[str, Any]
"""A share with its interval: mean, low, high, and the number of `pairs`."""


def accuracy_by_source(
    models: Mapping[str, Mapping[str, Row]],
    *,
    title: str = "Reward-model accuracy by source",
) -> Plot:
    """Held-out accuracy on the comparisons of each source, one colour a reward model.

    models: name -> source -> row {mean, low, high, pairs, ties}.
    """
    sources = list(dict.fromkeys(source for rows in models.values() for source in rows))
    with canvas(height=1.0 + 0.4 * max(2, len(sources))) as (figure, (axes,)):
        if not sources:
            nothing(axes)
        for i, (name, rows) in enumerate(models.items()):
            if not rows:
                continue
            shift = 0.18 * (i - (len(models) - 1) / 2)
            y = np.array([sources.index(source) for source in rows]) + shift
            mean, low, high = columns([_triple(row) for row in rows.values()])
            _dots(axes, i, xerr=bars(mean, low, high), label=name, at=(mean, y))
        if sources:
            _chance(axes, vertical=True)
            axes.set_yticks(range(len(sources)), sources)
            axes.set_ylim(len(sources) - 0.5, -0.5)
            axes.set_xlim(right=1.01)
            axes.xaxis.set_major_formatter(percent())
            axes.set_xlabel("pairs ranked as annotated")
            axes.grid(axis="y", visible=False)
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "Share of each source's held-out pairs whose chosen response scores higher, with 95 % "
        "intervals; a source near chance (50 %) is one the model has not learned, or one whose "
        "annotators want something else.",
        ("reward model", "source", "accuracy", "pairs"),
        [
            (name, source, _triple(row), row["pairs"])
            for name, rows in models.items()
            for source, row in rows.items()
        ],
    )


def accuracy_by_data(
    models: Mapping[str, Sequence[Row]], *, title: str = "Reward-model accuracy against data"
) -> Plot:
    """Held-out accuracy against the comparisons trained on, one line a model (Llama 2, Figure 6).

    models: name -> rows {comparisons, mean, low, high}, by rising number.
    """
    counts = sorted({row["comparisons"] for rows in models.values() for row in rows})
    with canvas(height=3.6) as (figure, (axes,)):
        if not counts:
            nothing(axes)
        else:
            axes.set_xscale("log")
            for i, (name, rows) in enumerate(models.items()):
                x = np.array([row["comparisons"] for row in rows], dtype=np.float64)
                mean, low, high = columns([_triple(row) for row in rows])
                # Side by side, so that intervals at one number of comparisons can be told apart.
                x *= 1.012 ** (i - (len(models) - 1) / 2)
                _dots(axes, i, yerr=bars(mean, low, high), label=name, at=(x, mean), line="-")
            _chance(axes)
            axes.set_xticks(counts, [f"{count:,.0f}" for count in counts])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(percent())
            axes.set_ylabel("pairs ranked as annotated")
            axes.set_xlabel("comparisons trained on")
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "Share of held-out pairs whose chosen response scores higher, with 95 % intervals. A line "
        "that still rises at its right end asks for more comparisons, lines that lie above each "
        "other for a larger model.",
        ("reward model", "comparisons", "accuracy", "pairs"),
        [
            (name, row["comparisons"], _triple(row), row["pairs"])
            for name, rows in models.items()
            for row in rows
        ],
    )


def calibration(
    models: Mapping[str, Mapping[str, Any]], *, title: str = "Calibration of the reward models"
) -> Plot:
    """Observed against predicted preference, and how many pairs each prediction got.

    models: name -> {bins, error, pairs} as `calibration.calibration` gives them.
    """
    with canvas(1, 2, height=3.6) as (figure, (axes, counts)):
        if not models:
            nothing(axes)
            nothing(counts)
        else:
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            for i, (name, found) in enumerate(models.items()):
                bins = found["bins"]
                x = np.array([row["predicted"] for row in bins])
                mean, low, high = columns([_triple(row) for row in bins])
                label = f"{name}, error {100 * found['error']:.1f} %"
                _dots(axes, i, yerr=bars(mean, low, high), label=label, at=(x, mean), line="-")
                share = [row["pairs"] / found["pairs"] for row in bins]
                style = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
                counts.plot(x, share, **style)  # type: ignore[arg-type]
            axes.set_ylim(-0.02, 1.02)
            axes.set_ylabel("first response was chosen")
            counts.set_ylim(bottom=0)
            counts.set_ylabel("share of the pairs")
            for panel in (axes, counts):
                panel.set_xlim(-0.02, 1.02)
                panel.set_xlabel("predicted P(first response is chosen)")
                panel.xaxis.set_major_formatter(percent())
                panel.yaxis.set_major_formatter(percent())
            legend(figure, axes)
    return Plot(
        figure,
        title,
        "Pairs in random order, in ten bins by the probability that the model gives to the first "
        "response. On the dashed line a prediction comes true as often as it says; flatter than "
        "it, the model claims too much. Error is the expected calibration error.",
        ("reward model", "predicted", "observed", "pairs"),
        [
            (name, row["predicted"], _triple(row), row["pairs"])
            for name, found in models.items()
            for row in found["bins"]
        ],
    )


def drift(
    models: Mapping[str, Mapping[str, Mapping[str, Row]]],
    *,
    title: str = "Reward models on each batch, before and after its refresh",
) -> Plot:
    """Held-out accuracy on each batch of comparisons, one panel a reward model.

    models: name -> batch -> {"before": row, "after": row}, in the order of the batches; either may
    be absent.
    """
    drawn = {name: batches for name, batches in models.items() if batches}
    with canvas(1, max(1, len(drawn)), height=3.4, sharey=True) as (figure, panels):
        if not drawn:
            nothing(panels[0])
        for axes, (name, batches) in zip(panels, drawn.items(), strict=False):
            for i, when in enumerate(("before", "after")):
                rows = [(j, b[when]) for j, b in enumerate(batches.values()) if when in b]
                x = np.array([j for j, _ in rows]) + 0.16 * (i - 0.5)
                mean, low, high = columns([_triple(row) for _, row in rows])
                label = f"{when} the refresh"
                _dots(axes, 1 - i, yerr=bars(mean, low, high), label=label, at=(x, mean))
                for at in zip(x, mean, strict=True):
                    beside = {"ha": ("right", "left")[i], "va": "center"}
                    note(axes, f"{100 * at[1]:.0f}", at, (6 * (2 * i - 1), 0), **beside)
            _chance(axes)
            long = max(map(len, batches)) * len(batches) * len(drawn) > 60
            side = "right" if long else "center"
            axes.set_xticks(range(len(batches)), list(batches), rotation=30 * long, ha=side)
            axes.set_xlim(-0.6, len(batches) - 0.4)
            axes.yaxis.set_major_formatter(percent())
            axes.set_title(name)
            axes.set_xlabel("batch of comparisons, of the newest policy")
            axes.grid(axis="x", visible=False)
        if drawn:
            panels[0].set_ylabel("pairs ranked as annotated")
            legend(figure, panels[0])
    return Plot(
        figure,
        title,
        "Accuracy before the refresh says how far the policy has moved beyond what the model was "
        "trained on; the refresh on the batch should win it back. Lines are 95 % intervals.",
        ("reward model", "batch", "before", "after", "after - before", "pairs"),
        [
            (
                name,
                batch,
                *(_triple(row[key]) if key in row else None for key in _DRIFT),
                next(row[key]["pairs"] for key in ("after", "before") if key in row),
            )
            for name, batches in drawn.items()
            for batch, row in batches.items()
        ],
    )


_DRIFT = ("before", "after", "change")


def _dots(
    axes: Axes,
    series: int,
    *,
    label: str,
    at: tuple[np.ndarray, np.ndarray],
    line: str = "",
    **ends: Any,
) -> None:
    """Means at `at` with their intervals."""
    axes.errorbar(
        *at,
        **ends,
        fmt=MARKERS[series % len(MARKERS)] + line,
        color=SERIES[series % len(SERIES)],
        markersize=5.5,
        linewidth=1.4,
        elinewidth=1.6,
        label=label,
    )


def _chance(axes: Axes, vertical: bool = False) -> None:
    """A line at 50 %."""
    draw = axes.axvline if vertical else axes.axhline
    draw(0.5, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)


def _triple(row: Row) -> Estimate:
    return row["mean"], row["low"], row["high"]
