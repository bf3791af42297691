"""Figures of the cluster model: parity with published runs, a gap taken apart, power caps.

Each function writes one file (.png, .svg or .pdf), drawn with matplotlib directly: this package
imports nothing of `llama2rt.report`, which has the figures of training runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2rt import atomic
from llama2rt.cluster import power_curve
from llama2rt.cluster.compare import PUBLISHED_RATIO, Comparison
from llama2rt.cluster.hardware import GPUS
from llama2rt.cluster.validate import Checked
from llama2rt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#5f6672")
_MARKERS = "os^DvPX*"
_SUFFIXES = (".png", ".svg", ".pdf")


def parity(checked: Sequence[Checked], path: Path) -> None:
    """Predicted over published throughput, one marker a run, one colour a group."""
    figure, (axes,) = _canvas(1, 9.2, 4.6)
    groups = list(dict.fromkeys(item.row.group for item in checked))
    for i, group in enumerate(groups):
        items = [item for item in checked if item.row.group == group]
        held_out = [item.row.split != "calibration" for item in items]
        for out, fill in ((False, True), (True, False)):
            drawn = [item for item, held in zip(items, held_out, strict=True) if held == out]
            if drawn:
                colour = _COLOURS[i % len(_COLOURS)]
                axes.scatter(
                    [item.row.cluster.gpus for item in drawn],
                    # A step's time is the inverse of a rate: up is always "predicted too fast".
                    [_speed_ratio(item) for item in drawn],
                    marker=_MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
                    facecolors=colour if fill else "none",
                    edgecolors=colour,
                    s=34,
                    label=f"{group}{' (held out)' if out else ''}",
                )
    axes.axhspan(0.88, 1.12, color="#dde1e7", alpha=0.6, zorder=0)
    axes.axhline(1, color="#5f6672", linewidth=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_ylabel("predicted / published speed")
    _title(axes, "Published training runs: filled calibrate, hollow are held out, band 12 %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def waterfall(comparison: Comparison, model: str, path: Path) -> None:
    """From the first cluster's throughput to the second's, one cause a step."""
    figure, (axes,) = _canvas(1, 9.2, 3.8)
    first, second = comparison.first, comparison.second
    names = [f"{first.fabric.name} {first.watts:g} W", *comparison.waterfall]
    names.append(f"{second.fabric.name} {second.watts:g} W")
    level = 1.0
    axes.bar(0, 1.0, color=_COLOURS[0], width=0.62)
    for i, (cause, share) in enumerate(comparison.waterfall.items(), start=1):
        colour = _COLOURS[7] if cause == "residual" else _COLOURS[1 if share > 0 else 2]
        axes.bar(i, share, bottom=level - share, color=colour, width=0.62)
        axes.plot([i - 0.69, i + 0.31], [level, level], color="#5f6672", linewidth=0.8)
        top = max(level, level - share)
        shown = f"{-100 * share:+.1f} %" if abs(share) >= 5e-4 else "0 %"
        axes.text(i, top + 0.004, shown, ha="center", va="bottom")
        level -= share
    ratio, last = comparison.ratio, len(names) - 1
    axes.bar(last, ratio.value, color=_COLOURS[0], width=0.62)
    axes.errorbar(
        last,
        ratio.value,
        yerr=[[ratio.value - ratio.low], [ratio.high - ratio.value]],
        color="#20242c",
        capsize=4,
    )
    axes.axhline(PUBLISHED_RATIO, color=_COLOURS[3], linewidth=1.2, linestyle="--")
    axes.text(0.36, PUBLISHED_RATIO - 0.004, "published: about 90 %", color="#a04a80", va="top")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(min(0.8, ratio.low - 0.03), 1.03)
    axes.set_ylabel(f"throughput, {first.fabric.name} {first.watts:g} W = 1")
    _title(axes, f"{model} on {first.gpus} GPUs: what the gap is made of; the bar is its range")
    _save(figure, path)


def caps(path: Path) -> None:
    """Throughput and energy per token against the cap, matrix-bound and memory-bound, A100."""
    figure, (left, right) = _canvas(2, 9.2, 3.6)
    gpu = GPUS["a100-80gb"]
    watts = [400.0, 350.0, 300.0, 250.0]
    works: tuple[tuple[power_curve.Workload, str], ...] = (
        ("matmul", "matrix-bound"),
        ("memory", "memory-bound"),
    )
    for i, (work, label) in enumerate(works):
        speeds = [power_curve.relative_throughput(work, cap, gpu) for cap in watts]
        draws = [power_curve.draw_watts(work, cap, gpu) for cap in watts]
        full = draws[0] / speeds[0].value
        style: dict[str, Any] = {"color": _COLOURS[i], "marker": _MARKERS[i], "label": label}
        left.plot(watts, [speed.value for speed in speeds], **style)
        left.fill_between(
            watts,
            [speed.low for speed in speeds],
            [speed.high for speed in speeds],
            color=_COLOURS[i],
            alpha=0.15,
        )
        energy = [draw / speed.value / full for draw, speed in zip(draws, speeds, strict=True)]
        right.plot(watts, energy, **style)
    left.set_ylabel("throughput, 400 W = 1")
    right.set_ylabel("GPU energy per token, 400 W = 1")
    for axes in (left, right):
        axes.set_xticks(watts)
        axes.invert_xaxis()
        axes.set_xlabel("power cap (W)")
    left.set_ylim(0.7, 1.02)
    left.legend(frameon=False, loc="lower left")
    figure.suptitle(
        f"A100 under a power cap: curve model, not measured here. {power_curve.NO_SWEEP}",
        x=0.01,
        ha="left",
        fontsize=10,
        fontweight="bold",
    )
    _save(figure, path)


def check_path(path: Path | None) -> None:
    """InputError unless the suffix is one that can be written; None means no figure."""
    if path is not None and path.suffix not in _SUFFIXES:
        raise InputError(f"--figure: expected a file ending in {', '.join(_SUFFIXES)}, got {path}")


def _speed_ratio(item: Checked) -> float:
    ratio = 1 + item.error
    return 1 / ratio if item.row.metric == "step_seconds" else ratio


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def _canvas(columns: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)
    axes = list(grid.flat)
    for each in axes:
        each.grid(color="#dde1e7", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: "Figure", path: Path) -> None:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=160, facecolor="#ffffff")
    atomic.write(path, buffer.getvalue())
