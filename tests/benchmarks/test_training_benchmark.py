"""The training benchmark runs, in its smoke mode, and notices sides that are not the same model."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "training"


def test_every_side_takes_steps_and_is_recorded(tmp_path):
    pytest.importorskip("transformers")
    run = run_python(FOLDER / "test_training_step.py", "--out", tmp_path, env={"BENCH_SMOKE": "1"})
    found = json.loads((tmp_path / "training-step-smoke.json").read_text())
    peers = {"transformers", "litgpt"} - found["absent"].keys()
    assert "transformers" in peers and ("litgpt" in peers) == (find_spec("litgpt") is not None)
    for way in ("kept_malloc", "as_shipped"):
        for setting in ("bf16", "masters"):
            result = found[way][setting]
            assert result["ratio"].keys() == peers and all(result["ratio"].values())
            assert all(values[1] < values[0] for values in result["loss"].values()), "no step taken"
    assert found["as_shipped"]["bf16"]["peak_bytes"].keys() == {"ours", *peers}
    for name, reason in found["absent"].items():
        assert f"{name} is not beside ours: {reason}" in run.stdout


def test_another_model_is_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import test_training_step as benchmark

    times = {"ours": [2.0, 2.0, 1.0], "transformers": [2.0, 2.0, 3.0]}
    same = {"ours": [4.0, 3.0, 2.0], "transformers": [4.005, 3.2, 2.5]}
    monkeypatch.setattr(benchmark, "WARM_UP", 2)
    assert benchmark.summary("bf16", times, same, {})["ratio"] == {"transformers": 3.0}
    with pytest.raises(AssertionError, match="not the same model"):
        benchmark.summary("bf16", times, same | {"transformers": [4.02, 3.2, 2.5]}, {})
    rounded = same | {"litgpt": [4.02, 3.0, 2.0]}
    benchmark.summary("bf16", times | {"litgpt": [1.0] * 3}, rounded, {})
    with pytest.raises(AssertionError, match="not the same model"):
        benchmark.summary("masters", times | {"litgpt": [1.0] * 3}, rounded, {})


def test_the_optimizer_is_measured(tmp_path):
    run_python(
        *("-m", "pytest", "-q", "--benchmark-disable", "benchmarks/training/test_optimizer.py"),
        cwd=FOLDER.parents[1],
        env={"BENCH_SMOKE": "1", "BENCH_OUT": str(tmp_path)},
    )
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("adamw-*.json"))
    (row,) = record["rows"]
    assert {"ours", "fused", "foreach"} <= row["rows"].keys() and row["ours"] == ["ours"]


def test_the_embedding_is_measured(tmp_path):
    run_python(
        *("-m", "pytest", "-q", "--benchmark-disable", "benchmarks/training/test_embedding.py"),
        cwd=FOLDER.parents[1],
        env={"BENCH_SMOKE": "1", "BENCH_OUT": str(tmp_path)},
    )
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("embedding-*.json"))
    assert len(record["rows"]) == 2  # fp32 and bf16
    for row in record["rows"]:
        assert row["rows"].keys() >= {"ours", "embedding", "index_select"}


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_rounds_of_grpo_are_taken_beside_trl_and_recorded(tmp_path):
    """In bf16, in a record of its own; fp32 differs by an argument."""
    size = "--prompts", "2", "--prompt-tokens", "16", "--tokens", "16"
    run = FOLDER / "group_step.py", "--precision", "bf16", *size, "--out", tmp_path
    run_python(*run, env={"BENCH_SMOKE": "1"})
    (record,) = tmp_path.iterdir()
    found = json.loads(record.read_text())
    assert record.name == "group-step-bf16.json" and found["what"].endswith("bf16")
    measured = found["smoke"]["grpo"]
    assert measured["rounds"].keys() == {"trl", "ours"} and "ppo" not in found["smoke"]
    assert all(seconds > 0 for seconds in measured["seconds"].values())


def test_reward_steps_of_other_losses_are_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import reward_step as benchmark

    monkeypatch.setattr(benchmark, "WARM_UP", 1)

    def taken(loss, *seconds):
        return [{"loss": loss, "seconds": s, "cpu_seconds": 2 * s, "peak": 8 * s} for s in seconds]

    steps = {"trl": taken(0.7, 9, 6, 5, 7), "whole": taken(0.7, 9, 4, 4), "ours": taken(0.7, 9, 1)}
    found = benchmark.summary(steps, 1e-4)
    assert found["trl_over_seconds"] == {"whole": 1.5, "ours": 6.0} == found["trl_over_cpu_seconds"]
    assert found["peak_of_trl"] == {"whole": 4 / 7, "ours": 1 / 7}
    assert "ours: 6.00x (6.00x in CPU time), memory 0.14" in benchmark.row("24M", "kept", found)
    with pytest.raises(AssertionError, match="not the same model"):
        benchmark.summary(steps | {"ours": taken(0.71, 9, 1)}, 1e-4)
