"""Figures about a run: what its metrics.jsonl says about how training went.

The rows are those of the file, as dicts; which panels are drawn follows from the keys found in
them, so that every stage's run gets its figure from one function. PPO and DPO have a second
figure each, for the trade they make.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from llama2rt.report.plot import MARKERS, MUTED, RAMP, SERIES, Plot, canvas, nothing, percent

Rows = Sequence[Mapping[str, float]]


class Metric(NamedTuple):
    """How a metric is drawn: `label` with its unit; `share` for values in [0, 1] as per cent;
    `noisy` where a running mean helps."""

    label: str
    share: bool = False
    noisy: bool = True


METRICS = {
    "loss": Metric("loss (nats a target)"),
    "validation_loss": Metric("validation loss (nats a target)"),
    "bits_per_byte": Metric("bits per byte"),
    "accuracy": Metric("accuracy", share=True),
    "score_gap": Metric("score gap, chosen - rejected"),
    "reward": Metric("reward"),
    "kl": Metric("KL to the reference (nats a response)"),
    "entropy": Metric("entropy (nats a token)"),
    "clip_fraction": Metric("clipped tokens", share=True),
    "value_loss": Metric("value loss"),
    "length": Metric("response length (tokens)"),
    "lr": Metric("learning rate", noisy=False),
    "gradient_norm": Metric("gradient norm"),
    "tokens_per_second": Metric("throughput (tokens/s)"),
    "mfu": Metric("model FLOP/s utilisation", share=True),
}
"""Metrics with a panel of their own, in the order of the panels."""


def curves(rows: Rows, *, title: str = "Training curves") -> Plot:
    """One small panel for each metric in the rows, against the optimizer step.

    The pale line is each logged value, the strong one their running mean. Rows need "step";
    non-finite values are left out. `METRICS` come first and with their units; other keys follow
    where they were logged more than once.
    """
    others = sorted({key for row in rows for key in row} - {"step", *METRICS})
    found = {key: _series(rows, key) for key in (*METRICS, *others)}
    found = {key: series for key, series in found.items() if len(series[0]) > (key not in METRICS)}
    columns = 2 if len(found) in (2, 4) else 3
    lines = max(1, -(-len(found) // columns))
    with canvas(lines, columns, height=2.15 * lines + 0.2) as (figure, panels):
        for axes, (key, (steps, values)) in zip(panels, found.items(), strict=False):
            metric = METRICS.get(key) or Metric(key.replace("_", " "))
            _curve(axes, steps, values, SERIES[0], noisy=metric.noisy)
            axes.set_title(metric.label, fontsize=9.5, fontweight="normal")
            if metric.share:
                axes.yaxis.set_major_formatter(percent())
        for axes in panels[len(found) :]:
            axes.set_axis_off()
        for axes in panels[max(0, len(found) - columns) : len(found)]:
            axes.set_xlabel("step")
        if not found:
            nothing(panels[0], "no metrics logged")
    return Plot(
        figure,
        title,
        "Pale: every logged value; strong: their running mean. A healthy loss falls and flattens, "
        "the gradient norm settles, throughput stays level.",
        ("metric", "values", "first", "last", "smallest", "largest"),
        [
            (key, len(values), values[0], values[-1], np.nanmin(values), np.nanmax(values))
            for key, (_, values) in found.items()
        ],
    )


def kl_against_reward(rows: Rows, *, title: str = "PPO: reward against KL") -> Plot:
    """Reward bought per nat of KL to the initial policy, the points in training order.

    rows: with "step", "kl" (nats a response) and "reward".
    """
    kept = [row for row in rows if _finite(row, "kl") and _finite(row, "reward")]
    kl, reward, step = (np.array([float(row[k]) for row in kept]) for k in ("kl", "reward", "step"))
    with canvas(height=3.4) as (figure, (axes,)):
        if not kept:
            nothing(axes)
        else:
            axes.plot(kl, reward, color=MUTED, linewidth=0.7, alpha=0.6)
            dots = axes.scatter(kl, reward, c=step, cmap=RAMP, s=26, vmin=0, zorder=3)
            axes.annotate("start", (kl[0], reward[0]), (7, -3), textcoords="offset points")
            if len(kept) > 1:
                axes.annotate("end", (kl[-1], reward[-1]), (7, -3), textcoords="offset points")
            axes.margins(x=0.08)
            axes.set_xlabel("KL to the initial policy (nats a response)")
            axes.set_ylabel("mean reward")
            figure.colorbar(dots, ax=axes, label="step")
    return Plot(
        figure,
        title,
        "Up and steep is reward gained cheaply; a line that runs right without rising drifts from "
        "the initial policy for nothing, and one that bends down exploits the reward model.",
        ("step", "KL", "reward"),
        [(int(step[i]), kl[i], reward[i]) for i in _some(len(kept))],
    )


def margins(rows: Rows, *, title: str = "DPO: implicit rewards") -> Plot:
    """Implicit rewards of chosen and rejected responses, their margin, and the accuracy.

    rows: with "step" and any of "chosen_reward", "rejected_reward", "margin" (all beta times the
    log-ratio to the reference) and "accuracy" (share of pairs with a positive margin).
    """
    left = {
        "chosen_reward": "chosen",
        "rejected_reward": "rejected",
        "margin": "margin (chosen - rejected)",
    }
    series = {key: _series(rows, key) for key in (*left, "accuracy")}
    with canvas(1, 2) as (figure, (axes, right)):
        drawn = [key for key in left if len(series[key][0])]
        for i, key in enumerate(drawn):
            _curve(axes, *series[key], SERIES[i], label=left[key], marker=MARKERS[i])
        if drawn:
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set_xlabel("step")
            axes.set_title("implicit reward (nats times beta)", fontsize=9.5, fontweight="normal")
            figure.legend(loc="outside upper left", ncols=len(drawn))
        else:
            nothing(axes)
        if len(series["accuracy"][0]):
            _curve(right, *series["accuracy"], SERIES[0])
            right.axhline(0.5, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            right.set_title("pairs with a positive margin", fontsize=9.5, fontweight="normal")
            right.yaxis.set_major_formatter(percent())
            right.set_xlabel("step")
        else:
            nothing(right)
    return Plot(
        figure,
        title,
        "The margin should grow from 0. A chosen reward that falls while the margin grows means "
        "the policy is unlearning both answers, the rejected one faster.",
        ("metric", "values", "first", "last"),
        [(key, len(y), y[0], y[-1]) for key, (x, y) in series.items() if len(x)],
    )


def _finite(row: Mapping[str, float], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and bool(np.isfinite(value)) and "step" in row


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    kept = [(row["step"], row[key]) for row in rows if _finite(row, key)]
    table = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    *,
    label: str | None = None,
    marker: str = "o",
    noisy: bool = True,
) -> None:
    # Plain numbers: a power of ten in the corner of a small panel collides with its title.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if not np.ptp(values):
        axes.set_yticks([values[0]])  # not five ticks with the same label
        noisy = False
    if len(values) < 20:
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=label)
        return
    # Bounded size however long the run: the extremes of at most 300 stretches, and their middles.
    stretches = np.array_split(np.arange(len(values)), min(300, len(values)))
    extremes = np.unique([s[f(values[s])] for s in stretches for f in (np.argmin, np.argmax)])
    if not noisy:
        axes.plot(steps[extremes], values[extremes], color=colour, label=label)
        return
    axes.plot(steps[extremes], values[extremes], color=colour, linewidth=0.8, alpha=0.35)
    mean, reach = _running_mean(values)
    at = np.array([s[len(s) // 2] for s in stretches])
    at = at[reach[at] >= reach.max() / 3]
    axes.plot(steps[at], mean[at], color=colour, label=label)


def _running_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred mean over a twentieth of the run, and how far each reaches to either side: less
    towards the ends, so that a steep start is neither flattened nor shifted."""
    index = np.arange(len(values))
    reach = np.minimum(max(1, len(values) // 40), np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1), reach


def _some(count: int, most: int = 20) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []
