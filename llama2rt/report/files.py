"""Files of a report, written whole or not at all: a report half overwritten would be a lie."""

import json
import math
import os
from pathlib import Path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content` atomically, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, numbers: object) -> None:
    """Write `numbers` as indented JSON, atomically.

    NumPy scalars and arrays are allowed; NaN and infinity become null, which every JSON reader
    understands. TypeError for anything else JSON has no form for.
    """
    text = json.dumps(plain(numbers), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


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
