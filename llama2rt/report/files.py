"""Numbers of a report as JSON that every reader takes."""

import json
import math
from pathlib import Path

from llama2rt import atomic


def write_json(path: str | Path, numbers: object) -> None:
    """Write `numbers` as indented JSON, atomically.

    NumPy scalars and arrays are allowed; NaN and infinity become null, which every JSON reader
    understands. TypeError for anything else JSON has no form for.
    """
    text = json.dumps(plain(numbers), indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write(path, text + "\n")


def plain(value: object) -> object:
    """`value` in JSON's own types."""
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, without importing NumPy here
        value = value.tolist()
    if hasattr(value, "_asdict"):  # intervals and other named tuples keep their names
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
