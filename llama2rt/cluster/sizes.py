"""Sizes in bytes as people write and read them; no torch, so that the models can use it too."""

import re

from llama2rt.errors import InputError

_UNITS = {
    "B": 1,
    **{f"{prefix}iB": 1024 ** (k + 1) for k, prefix in enumerate("KMG")},
    **{f"{prefix}B": 1000 ** (k + 1) for k, prefix in enumerate("KMG")},
}


def parse_bytes(text: str) -> int:
    """8, 8B, 4KiB, 2GB ... in bytes (KiB is 1024, KB 1000); InputError for anything else."""
    match = re.fullmatch(r"(\d+) ?([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    unit = match[2].lower() if match else ""
    if match is None or (unit or "b") not in units:
        raise InputError(f"{text!r} is no size: expected a number and one of {', '.join(_UNITS)}")
    return int(match[1]) * units[unit or "b"]


def bytes_text(count: int) -> str:
    """4096 -> "4 KiB"; binary units, since sizes double."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.4g} {unit}"
    return f"{count} B"
