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
    # The comparison sees a judgement that is lost, and one that is there twice.
    store = tmp_path / "store"
    db = script.sqlite3.connect(store / "judgements.sqlite")
    rows = db.execute(
        "SELECT task, rating, skipped, undone FROM judgements JOIN annotators a "
        "ON a.id = annotator WHERE a.name = 'rater 0' ORDER BY judgements.id"
    ).fetchall()
    db.close()
    ledger = [dict(zip(("task", "rating", "skipped", "undone"), row, strict=True)) for row in rows]
    for wrong, count in ((ledger, 0), ([*ledger, ledger[0]], 1), (ledger[1:], 1)):
        rater = script.Rater(None, 0, wrong)
        assert len(script.differences(store, {"rater 0": rater})) == count
