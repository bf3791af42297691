"""The server is killed among its annotators: nothing is lost, nothing is there twice.

A small version of benchmarks/annotation/many_annotators.py, which runs for a minute."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "annotation" / "many_annotators.py"


def test_a_killed_server_loses_and_doubles_nothing(tmp_path) -> None:
    for name in ("fastapi", "uvicorn", "markdown_it"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra serve)")
    spec = importlib.util.spec_from_file_location("many_annotators", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.run(tmp_path, seconds=3, annotators=3, kills=1, pairs=200, seed=0, least=12)
    assert not found["problems"] and not found["differences"], found
    assert found["posts"] >= 36 and found["sent_twice"] > 0 and found["ended_with"] == 0
    # The comparison sees a judgement that is missing, and one too many.
    with script.sqlite3.connect(tmp_path / "store" / "judgements.sqlite") as db:
        db.execute("UPDATE judgements SET rating = 'better', skipped = NULL, undone = 0")
    rater = script.Rater(None, 0, [{"task": 1, "rating": "better", "skipped": None, "undone": 0}])
    assert script.differences(tmp_path / "store", {"rater 0": rater})
