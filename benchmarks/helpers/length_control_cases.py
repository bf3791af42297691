"""A small case of AlpacaEval's length-controlled win rate, for its test and its comparison."""

from pathlib import Path
from typing import Any


def annotations() -> list[dict[str, Any]]:
    """What a judge that likes length says of 12 outputs."""
    found: list[dict[str, Any]] = []
    for i in range(12):
        lengths = 5 + 7 * i % 23, 4 + 11 * i % 29
        value = [1.0, 2.0, 1.5, 0.0, 1.25, 1.8][(5 * i + (lengths[1] > lengths[0])) % 6]
        found.append(
            {
                "instruction": f"q{i}",
                "output_1": "x" * lengths[0],
                "generator_1": "base",
                "output_2": "y" * lengths[1],
                "generator_2": "model",
                "annotator": "judge",
                "preference": value,
            }
        )
    return found


def gamed(path: Path) -> Path:
    """A table of df_gamed.csv's form for the same 12 instructions."""
    lines = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    for model, sign in (("concise", 1), ("verbose", -1)):
        for i in range(12):
            length, won = sign * (0.2 + 0.15 * (i % 5)), 0.5 - sign * (0.1 + 0.02 * (i % 7))
            lines.append(f"{won:.4f},{i},{length:.4f},{(i * 5 % 12 - 6) / 4},False,{model}")
    path.write_text("\n".join(lines) + "\n")
    return path
