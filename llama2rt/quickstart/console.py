"""What a person sees on the terminal when the main job is done (stderr)."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_console = Console(stderr=True, highlight=False)


def summary(directory: Path, numbers: dict[str, Any]) -> None:
    """The table of versions, the reward models' accuracy, three answers before and after."""
    table = Table(title="Held-out prompts, judged", title_justify="left")
    for name in ("version", "helpfulness", "95 % interval", "unsafe", "correct", "words"):
        table.add_column(name, justify="left" if name == "version" else "right")
    for version in numbers["versions"]:
        helpful, unsafe = version["helpfulness"], version["unsafe"]
        table.add_row(
            version["name"],
            f"{helpful['mean']:.3f}",
            f"{helpful['low']:.3f}\N{EN DASH}{helpful['high']:.3f}",
            f"{unsafe['mean']:.0%}",
            f"{version['correct']['mean']:.0%}",
            f"{version['words']['mean']:.1f}",
        )
    _console.print()
    _console.print(table)
    for kind, model in numbers["reward_models"].items():
        shares = ", ".join(
            f"{rating.replace('_', ' ')} {share:.0%}" for rating, share in model["accuracy"].items()
        )
        _console.print(f"[bold]{kind} reward model[/], held-out accuracy: {shares}")
    for answer in numbers["answers"]:
        _console.print()
        for message in answer["messages"]:
            _console.print(f"[dim]{message['role']:>14}[/]  {escape(message['content'])}")
        for name, text in answer["answers"].items():
            _console.print(f"[cyan]{name:>14}[/]  {escape(text)}")
    minutes = numbers["seconds"] / 60
    memory = numbers["peak_memory_bytes"] / 2**30
    _console.print(
        f"\n[bold]{minutes:.1f} minutes, {memory:.2f} GiB.[/] Report: {directory / 'report.html'}"
    )
