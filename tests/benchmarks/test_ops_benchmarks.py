"""The benchmarks of ops run, at sizes that measure nothing, and cannot rot: every op has its rows,
records and figure; a machine that was not quiet is noticed; a target is judged the right way round.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import figures
import measure
import peers
import power
import pytest
import records
import targets
import torch
from processes import run_python

from llama2rt.ops.backend import OPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a whole run in smoke mode."""
    out = tmp_path_factory.mktemp("bench")
    settings = {"BENCH_SMOKE": "1", "BENCH_OUT": str(out)}
    run_python(
        "-m", "pytest", "-q", "benchmarks/ops", "--benchmark-disable", cwd=ROOT, env=settings
    )
    return out


def test_every_op_is_measured_against_eager_and_inductor(smoke):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS:
        record = json.loads((smoke / f"{op}-{device}.json").read_text())
        directions = {row["direction"] for row in record["rows"]}
        assert "forward" in directions
        assert op == "decode_attention" or any("backward" in way for way in directions)
        assert record["versions"]["torch"] and record["date"] and record["machine"]
        for row in record["rows"]:
            assert {"eager", "inductor", *row["ours"]} <= row["rows"].keys()
            assert all(one["rate"] > 0 <= one["extra_bytes"] for one in row["rows"].values())
            assert all(row["rows"][name]["ratio"]["eager"] > 0 for name in row["ours"])
            # One call is too short for any counter: what is not measured says why, and is never 0.
            assert all(one["joules_per_call"] is None for one in row["rows"].values())
            assert row["energy_not_measured"]


def test_a_figure_is_drawn_of_each(smoke):
    figures.main(smoke)
    drawn = sorted(path.stem for path in smoke.glob("*.svg"))
    assert drawn == sorted(path.stem for path in smoke.glob("*.json")) and len(drawn) == len(OPS)
    assert "llama2rt (" in next(smoke.glob("rms_norm-*.svg")).read_text().replace("&#40;", "(")


def case(**changes) -> measure.Case:
    values = {
        "op": "rms_norm",
        "direction": "forward",
        "device": "cpu",
        "size": "3 x 4",
        "x": 24,
        "axis": "bytes",
        "work": 48,
        "unit": "bytes",
        "ceiling": "clone",
        "ceiling_work": 48,
        "set_up": lambda: None,
        "input_bytes": 48,
    }
    return measure.Case(**(values | changes))


def test_a_machine_that_is_not_quiet_is_noticed(monkeypatch):
    drifts = iter([0.3, 0.05, 0.3, 0.4, 0.11])
    monkeypatch.setattr(measure, "measured", lambda case: {"drift": next(drifts)})
    assert measure.quiet(case()) == {"drift": 0.05, "attempts": 2}
    with pytest.raises(pytest.fail.Exception, match=r"moved by 11%.*not quiet"):
        measure.quiet(case())


@pytest.mark.parametrize(("least", "span", "made"), [(5, 0.0, 5), (5, 0.9, 5), (2, 1.0, 4)])
def test_rounds_go_on_for_as_long_as_asked(monkeypatch, least, span, made):
    """Two calls of 1/8 s a round: 1 s has four rounds."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += 0.125

    found = measure.rounds(
        {"ours": run, "theirs": run}, "cpu", {"ours": 1, "theirs": 1}, least, span
    )
    assert found == {"ours": [0.125] * made, "theirs": [0.125] * made}


def test_a_peer_that_cannot_is_left_out_and_ours_may_not_fail():
    def refuse(x):
        raise RuntimeError("not for this shape")

    x = torch.randn(3)
    works, fails = measure.Contender(torch.square, (x,)), measure.Contender(refuse, (x,))

    def calls(**contenders):
        return measure.rotating(case(set_up=lambda: measure.SetUp(x.clone, contenders)))

    found = calls(cpu=works, eager=fails)
    assert found.contenders.keys() == {"cpu"}
    assert found.left_out == {"eager": "RuntimeError: not for this shape"}
    with pytest.raises(RuntimeError, match="not for this shape"):
        calls(cpu=fails, eager=works)


def test_energy_is_metered_over_as_many_calls_as_the_counter_needs(tmp_path, monkeypatch):
    """RAPL needs 10 ms: calls of 1 ms are made 15 times, one of 2 s once, each at 50 W."""
    now = [0.0]
    for seconds, calls in ((0.001, 15), (2.0, 1)):
        meter = power.tree(tmp_path / str(calls), 50.0, lambda: now[0])
        monkeypatch.setattr(measure.energy, "of_device", lambda device, meter=meter: meter)

        def run(seconds=seconds):
            now[0] += seconds

        made, used = measure.energy_of(run, "cpu", seconds)
        assert made == calls
        assert used.joules_per(made) == pytest.approx(50 * seconds, rel=1e-3)


def test_nothing_is_run_for_a_meter_that_is_not_there(tmp_path, monkeypatch):
    meter = measure.energy.EnergyMeter(powercap=tmp_path / "nothing")
    monkeypatch.setattr(measure.energy, "of_device", lambda device: meter)

    def run():
        raise AssertionError("no counter, nothing to run for")

    calls, used = measure.energy_of(run, "cpu", 1.0)
    assert used.joules_per(calls) is None and "no RAPL domain" in used.not_measured["CPU"]


def rows(**seconds: float) -> dict[str, dict]:
    found = {
        name: {"seconds": s, "rate": 48 / s, "percent_of_ceiling": 100 * 0.9 / s, "extra_bytes": 10}
        for name, s in seconds.items()
    }
    found["cpu"]["ratio"] = {peer: s / seconds["cpu"] for peer, s in seconds.items()}
    return found


def test_targets_are_judged_the_right_way_round():
    def verdicts(case, found):
        return {v["target"]: v["met"] for v in targets.judge(case, "cpu", found)}

    fast, slow = rows(cpu=1.0, eager=3.1, inductor=1.2), rows(cpu=2.0, eager=3.1, inductor=1.2)
    names = (">= 3x eager", ">= 1.1x inductor", ">= 80 % of clone")
    assert verdicts(case(), fast) == dict.fromkeys(names, True)
    assert verdicts(case(), slow) == dict.fromkeys(names, False)
    assert verdicts(case(judged=False), fast) == {}
    assert set(verdicts(case(), rows(cpu=1.0, eager=9.0))) == {names[0], names[2]}
    loss = case(op="token_logprob", limit_bytes=80)
    memory = "<= 1/8 of the logits' memory"
    assert verdicts(loss, fast)[memory]
    assert not verdicts(case(op="token_logprob", limit_bytes=79), fast)[memory]


def test_targets_name_only_ops_and_directions_that_exist():
    tables = [targets.CPU, *targets.GPUS.values()]
    assert {op for table in tables for op, _ in table} <= set(OPS)
    ways = {way for table in tables for _, way in table}
    ways |= {way for table in targets.ATTENTION.values() for way in table}
    assert ways == measure.DIRECTIONS.keys() - {"step"}


def test_a_case_measured_again_replaces_its_row_and_commits_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_OUT", str(tmp_path))
    monkeypatch.setattr(records, "commit", lambda: "first")

    def read() -> list[tuple]:
        found = json.loads((tmp_path / "rms_norm-cpu.json").read_text())
        return [(row["direction"], row["drift"]) for row in found["rows"]]

    records.add(case(), {"drift": 1}, ["cpu"])
    records.add(case(direction="backward"), {"drift": 2}, ["cpu"])
    records.add(case(), {"drift": 3}, ["cpu"])
    assert read() == [("backward", 2), ("forward", 3)]
    monkeypatch.setattr(records, "commit", lambda: "second")
    records.add(case(), {"drift": 4}, ["cpu"])
    assert read() == [("forward", 4)]
    monkeypatch.delenv("BENCH_OUT")
    records.add(case(), {"drift": 5}, ["cpu"])
    assert read() == [("forward", 4)]


def test_another_apex_is_no_peer(monkeypatch):
    """PyPI's apex imports, and has no normalization."""
    other = ModuleType("apex")
    other.__path__ = []
    monkeypatch.setitem(sys.modules, "apex", other)
    peers._why_not.cache_clear()
    try:
        assert "apex.normalization" in peers.missing()["apex"]
        assert "apex" not in peers.functions("rms_norm", "cuda")
    finally:
        peers._why_not.cache_clear()


def test_products_of_many_rows_are_measured_beside_torchs(tmp_path):
    run_python(ROOT / "benchmarks/ops/many_rows.py", "--out", tmp_path, env={"BENCH_SMOKE": "1"})
    found = json.loads((tmp_path / "many-rows.json").read_text())
    for shape in ("quickstart", "24M"):
        for setting in ("same", "another"):
            measured = found[shape][setting]
            torchs, ours = (measured[f"{side}_microseconds_a_row"] for side in ("torch", "ours"))
            assert measured["ratio"] == pytest.approx(torchs / ours) and ours > 0
