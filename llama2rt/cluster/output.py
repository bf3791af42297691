"""What the model's subcommands print: tables for people, one JSON object for programs."""

import json
from collections.abc import Iterable, Mapping, Sequence

from llama2rt.cluster.estimate import Estimate


def ranged(estimate: Estimate, digits: int) -> str:
    """`value (low-high)`."""
    value, low, high = (f"{x:,.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low}-{high})"


def or_else(value: float | None, form: str, otherwise: str) -> str:
    """The value in a format, or words where there is none."""
    return otherwise if value is None else form.format(value)


def table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[str]], note: str = ""
) -> None:
    """A table with its title above and a note below; the first column is text, the rest numbers."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines:
        grid.add_row(*line)
    console = Console()
    # A pipe has no width of its own; cut cells would lose digits.
    Console(width=console.width if console.is_terminal else 160, highlight=False).print(grid)


def print_json(result: Mapping[str, object]) -> None:
    """One line; ValueError for NaN and infinity, which JSON has no form for."""
    print(json.dumps(result, allow_nan=False))
