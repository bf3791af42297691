"""Figures about a run: what its metrics.jsonl says about how training went.

The rows are those of the file, as dicts, and their keys decide which panels are drawn, so that one
function draws every stage's run. PPO and DPO have a second figure each: reward against KL, and
log-probabilities with their margin.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llama2rt.report.plot import MARKERS, MUTED, RAMP, SERIES, Plot, canvas, nothing, percent

Rows = Sequence[Mapping[str, Any]]
Series = tuple[np.ndarray, np.ndarray]
"""(steps, values), fp64 [n] each."""


class Metric(NamedTuple):
    """How a metric is drawn."""

    label: str
    """with its unit"""
    share: bool = False
    """whether values in [0, 1] are drawn as per cent"""
    noisy: bool = True
    """whether a running mean is drawn too"""


METRICS = {
    "loss": Metric("loss (nats a target)"),
    "bits_per_byte": Metric("bits per byte"),
    "accuracy": Metric("pairs ranked as labelled", share=True),
    "score_gap": Metric("score gap, chosen - rejected"),
    "safety_loss": Metric("safety loss (nats a pair)"),
    "objective": Metric("objective (bounded reward less KL)"),
    "reward": Metric("reward"),
    "score": Metric("combined score, kinds alike"),
    "score/on_helpfulness": Metric("combined score, helpfulness prompts"),
    "score/on_safety": Metric("combined score, safety prompts"),
    "score/helpfulness": Metric("helpfulness score"),
    "score/safety": Metric("safety score"),
    "kl_k1": Metric("KL to the reference (nats a response)"),
    "kl_k3": Metric("KL, k3 estimate (nats a response)"),
    "kl_exact": Metric("KL, summed over the vocabulary (nats a response)"),
    "beta": Metric("KL penalty, adapted", noisy=False),
    "entropy": Metric("entropy (nats a token)"),
    "response_tokens": Metric("response length (tokens)"),
    "cut_share": Metric("responses cut at the limit", share=True),
    "policy_loss": Metric("policy loss"),
    "value_loss": Metric("value loss"),
    "value_explained_variance": Metric("returns explained by the critic"),
    "clip_fraction": Metric("clipped tokens", share=True),
    "ratio": Metric("probability ratio to the rollout's policy"),
    "update_kl": Metric("KL to the rollout's policy (nats a token)"),
    "updates": Metric("gradient steps a rollout", noisy=False),
    "chosen_logprob": Metric("chosen log-probability (nats)"),
    "rejected_logprob": Metric("rejected log-probability (nats)"),
    "margin": Metric("implicit reward margin (nats)"),
    "lr": Metric("learning rate", noisy=False),
    "gradient_norm": Metric("gradient norm"),
    "critic_gradient_norm": Metric("critic's gradient norm"),
    "tokens_per_second": Metric("throughput (tokens/s)"),
    "mfu": Metric("model FLOP/s utilisation", share=True),
    "joules_per_token": Metric("energy (J/token)"),
    "joules_per_step": Metric("energy (J/step)"),
}
"""Metrics with a unit, in the order of their panels. A key `held_out_X` or `held_out/X` is drawn
into the panel of X."""


def curves(rows: Rows, *, title: str = "Training curves") -> Plot:
    """One small panel for each metric in the rows, against the optimizer step.

    The pale line is each logged value, the strong one their running mean; held-out values join the
    panel of their metric. Rows need "step"; non-finite values are left out. `METRICS` come first;
    other keys follow where they were logged more than once.
    """
    keys = {key for row in rows for key in row} - {"step"}
    found = {key: _series(rows, key) for key in sorted(keys)}
    found = {
        key: series for key, series in found.items() if len(series[0]) > (_base(key) not in METRICS)
    }
    order = [*METRICS, *sorted({_base(key) for key in found} - METRICS.keys())]
    panels = {base: [key for key in found if _base(key) == base] for base in order}
    panels = {base: sorted(lines, key=len) for base, lines in panels.items() if lines}
    columns = 2 if len(panels) in (2, 4) else 3
    lines = max(1, -(-len(panels) // columns))
    with canvas(lines, columns, height=2.15 * lines + 0.2) as (figure, grid):
        for axes, (base, members) in zip(grid, panels.items(), strict=False):
            metric = METRICS.get(base) or Metric(base.replace("_", " "))
            for key in members:
                held_out = key != base
                _curve(
                    axes,
                    *found[key],
                    SERIES[held_out],
                    marker=MARKERS[held_out],
                    label="held out" if held_out else "training",
                    noisy=metric.noisy and not held_out,
                )
            if any(key != base for key in members):
                axes.legend(fontsize=8, handlelength=1.4)
            axes.set_title(metric.label, fontsize=9.5, fontweight="normal")
            if metric.share:
                axes.yaxis.set_major_formatter(percent())
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("step")
        if not panels:
            nothing(grid[0], "no metrics logged")
    return Plot(
        figure,
        title,
        "Pale: every logged value; strong: their running mean; squares: held-out data. A healthy "
        "loss falls and flattens, held out as in training; the gradient norm settles.",
        ("metric", "values", "first", "last", "smallest", "largest"),
        [
            (key, len(values), values[0], values[-1], values.min(), values.max())
            for members in panels.values()
            for key, (_, values) in ((key, found[key]) for key in members)
        ],
    )


def kl_against_reward(rows: Rows, *, title: str = "PPO: reward against KL") -> Plot:
    """Reward bought per nat of KL to the initial policy, the points in training order.

    rows: with "step", "kl_k1" (nats a response) and "reward".
    """
    kept = [row for row in rows if _finite(row, "kl_k1") and _finite(row, "reward")]
    step, kl, reward = (
        np.array([float(row[key]) for row in kept]) for key in ("step", "kl_k1", "reward")
    )
    with canvas(height=3.4) as (figure, (axes,)):
        if not kept:
            nothing(axes)
        else:
            axes.plot(kl, reward, color=MUTED, linewidth=0.7, alpha=0.6)
            dots = axes.scatter(kl, reward, c=step, cmap=RAMP, s=26, zorder=3)
            axes.annotate("start", (kl[0], reward[0]), (7, -3), textcoords="offset points")
            if len(kept) > 1:
                axes.annotate("end", (kl[-1], reward[-1]), (7, -3), textcoords="offset points")
            axes.margins(x=0.08)
            axes.set_xlabel("KL to the initial policy (nats a response)")
            axes.set_ylabel("mean reward")
            figure.colorbar(
                dots, ax=axes, label="iteration", ticks=MaxNLocator(nbins=6, integer=True)
            )
    return Plot(
        figure,
        title,
        "Up and steep is reward gained cheaply; a line that runs right without rising drifts from "
        "the initial policy for nothing, and one that bends down has over-optimised its reward.",
        ("iteration", "KL", "reward"),
        [(int(step[i]), kl[i], reward[i]) for i in _some(len(kept))],
    )


def margins(rows: Rows, *, title: str = "DPO: log-probabilities and margin") -> Plot:
    """Log-probabilities of chosen and rejected responses, their implicit margin, the accuracy.

    rows: with "step" and any of "chosen_logprob", "rejected_logprob" (nats a response), "margin"
    (beta times the log-ratios' difference) and "accuracy" (share of pairs with margin above 0).
    """
    keys = ("chosen_logprob", "rejected_logprob", "margin", "accuracy")
    series = {key: _series(rows, key) for key in keys}
    panels = (
        ("log-probability (nats a response)", keys[:2], None),
        ("implicit margin (nats)", ("margin",), 0.0),
        ("pairs with a margin above 0", ("accuracy",), 0.5),
    )
    with canvas(1, 3, height=2.9) as (figure, grid):
        for axes, (label, members, neutral) in zip(grid, panels, strict=True):
            drawn = [key for key in members if len(series[key][0])]
            if not drawn:
                nothing(axes)
                continue
            for i, key in enumerate(drawn):
                name = key.removesuffix("_logprob")
                _curve(axes, *series[key], SERIES[i], label=name, marker=MARKERS[i])
            if len(members) > 1:
                axes.legend(fontsize=8, handlelength=1.4)
            if neutral is not None:
                axes.axhline(neutral, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            axes.set_title(label, fontsize=9.5, fontweight="normal")
            axes.set_xlabel("step")
        if len(series["accuracy"][0]):
            grid[2].yaxis.set_major_formatter(percent())
    return Plot(
        figure,
        title,
        "The margin should grow from 0. A chosen log-probability that falls with the rejected one "
        "means that the policy unlearns both answers, the rejected one faster.",
        ("metric", "values", "first", "last"),
        [(key, len(y), y[0], y[-1]) for key, (_, y) in series.items() if len(y)],
    )


def _base(key: str) -> str:
    return key.removeprefix("held_out/").removeprefix("held_out_")


def _finite(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and bool(np.isfinite(value)) and "step" in row


def _series(rows: Rows, key: str) -> Series:
    kept = [(row["step"], row[key]) for row in rows if _finite(row, key)]
    table = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    *,
    label: str,
    marker: str = "o",
    noisy: bool = True,
) -> None:
    # Plain numbers: a power of ten in the corner of a small panel collides with its title.
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if not np.ptp(values) and not axes.lines:
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


def _plain(value: float, _: int) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _running_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(centred mean over a twentieth of the run, how far it reaches to either side, which is less
    towards the ends, so that a steep start is neither flattened nor shifted)."""
    index = np.arange(len(values))
    reach = np.minimum(max(1, len(values) // 40), np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1), reach


def _some(count: int, most: int = 20) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []
