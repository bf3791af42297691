"""The benchmark of the cache's memory runs and finds the same tokens under every limit."""

import json
from pathlib import Path

from processes import run_python

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "generation" / "cache_memory.py"


def test_every_limit_gives_the_same_tokens_and_is_recorded(tmp_path):
    out = tmp_path / "cache-memory.json"
    small = ("--layers", "1", "--prompts", "6", "--length", "40", "--tokens", "2")
    run_python(SCRIPT, *small, "--mib", "32", "96", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["mib"] for row in rows] == [32, 96]
    assert len({row["tokens_sha256"] for row in rows}) == 1
    assert all(0 < row["peak_above_mib"] <= row["mib"] for row in rows)
