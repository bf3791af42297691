"""The look of every figure, and the way from a matplotlib figure to SVG inside an HTML page.

A `Plot` carries its numbers with its drawing: the page shows the picture, one sentence on how to
read it, and the same numbers as a table for those who cannot see it or want to copy them.

Colours are written into the SVG as CSS variables, so that one file is legible on light and dark
screens and on paper; the palette is Okabe and Ito's, told apart by colour-blind readers, and
markers differ too. Text stays text. pyplot and its global state are not used.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter

from llama2rt import atomic

INK, MUTED, GRID = "#20242c", "#5f6672", "#dde1e7"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b")
# For ordered series, both ends legible on white and on black (those of viridis or plasma are not).
RAMP = LinearSegmentedColormap.from_list("cold-hot", ["#3b7dd8", "#9a6fb0", "#e0532f"])
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "errorbar.capsize": 0,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.05,
    "figure.constrained_layout.hspace": 0.05,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of versions are not formulas
}


@dataclass(frozen=True)
class Plot:
    """A drawing with what a reader needs beside it."""

    figure: Figure
    title: str
    """what is drawn"""
    read: str
    """one sentence on how to read it"""
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    """the numbers drawn, as a table under `header`"""

    def svg(self, salt: str = "") -> str:
        """The drawing as an `<svg>` element to stand inside HTML, without links or scripts.

        salt: becomes part of the ids of clip paths and markers; each figure of a page needs a
        different one.
        """
        buffer = io.StringIO()
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{self.title} {salt}"}):
            self.figure.savefig(
                buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        drawing = buffer.getvalue()
        drawing = drawing[drawing.index("<svg") :]
        drawing = re.sub(r"\s*<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
        drawing = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", drawing)
        drawing = drawing.replace("xlink:href=", "href=")
        referenced = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", drawing))
        drawing = re.sub(
            r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in referenced else "", drawing
        )
        for colour, variable in VARIABLES.items():
            drawing = drawing.replace(colour, f"var({variable})")
        label = escape(f"{self.title}. {self.read}")
        return drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()

    def save(self, path: str | Path) -> None:
        """Write the drawing alone, on white; the format follows the suffix (.png, .svg, .pdf)."""
        path = Path(path)
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(
                buffer, format=path.suffix.lstrip("."), dpi=160, facecolor="#ffffff"
            )
        atomic.write(path, buffer.getvalue())


@contextmanager
def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 9.2,
    height: float = 3.2,
    sharey: bool = False,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A styled figure of `width` x `height` inches with its axes in reading order.

    What is drawn inside the `with` block takes the style.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
        yield figure, list(grid.flat)


def percent() -> Formatter:
    """Axis labels in per cent for shares in [0, 1]."""
    return FuncFormatter(lambda share, _: f"{100 * share:.4g} %")


def nothing(axes: Axes, reason: str = "no data") -> None:
    """Say on empty axes that there was nothing to draw, instead of showing an empty frame."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=MUTED)
