"""Figures of the reward models: how well they rank, what they give, whether they pay for length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike

from llama2rt.report.figures.marks import Estimate, bars, columns, legend, note
from llama2rt.report.plot import INK, MUTED, SERIES, Plot, canvas, nothing, percent

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
    positions = np.array([j + 0.3 * (rating == "average") for j, rating in enumerate(ratings)])
    with canvas(height=3.4) as (figure, (axes,)):
        if not ratings:
            nothing(axes)
        width = 0.8 / max(1, len(models))
        for i, (name, rows) in enumerate(models.items()):
            by_rating = {str(row["rating"]): row for row in rows}
            kept = [j for j, rating in enumerate(ratings) if rating in by_rating]
            x = positions[kept] + (i - (len(models) - 1) / 2) * width
            mean, low, high = columns([_triple(by_rating[ratings[j]]) for j in kept])
            axes.bar(x, mean, width * 0.88, color=SERIES[i % len(SERIES)], alpha=0.85, label=name)
            axes.errorbar(x, mean, bars(mean, low, high), fmt="none", ecolor=INK, elinewidth=1.1)
            for middle, value, top in zip(x, mean, high, strict=True):
                note(axes, f"{100 * value:.0f}", (middle, top), (0, 3), ha="center")
        if ratings:
            axes.axhline(0.5, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            right_end = {"xycoords": ("axes fraction", "data"), "va": "center", "color": MUTED}
            note(axes, "chance", (1.0, 0.5), (2, 0), **right_end)
            axes.set_xticks(positions, [rating.replace("_", " ") for rating in ratings])
            axes.set_ylim(0, 1.08)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
            axes.yaxis.set_major_formatter(percent())
            axes.set_ylabel("pairs ranked as annotated")
            axes.grid(axis="x", visible=False)
            legend(figure, axes)
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


def reward_distribution(
    rewards: Mapping[str, ArrayLike],
    *,
    label: str = "reward",
    title: str = "Reward distribution by version",
) -> Plot:
    """Distribution of the rewards of each version's answers: violins with quartiles.

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
                note(axes, mean, (1, i), (8, 0), va="center")
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


def _triple(row: Mapping[str, Any]) -> Estimate:
    return row["mean"], row["low"], row["high"]
