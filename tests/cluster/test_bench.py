"""`cluster bench` on gloo processes: what it records, and what is left when it does not finish."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llama2rt import energy
from llama2rt.cluster import bench, bench_output, records, sizes, timing
from llama2rt.cluster.operations import OPERATIONS
from llama2rt.errors import InputError

from .conftest import BENCH, TIMEOUT_SECONDS, start


def finished(text: str) -> dict:
    record = json.loads(text)
    json.dumps(record, allow_nan=False)
    return record


def test_two_processes_measure_all_operations(torchrun, tmp_path):
    out = tmp_path / "bench.json"
    options = ["--min-bytes", "8B", "--max-bytes", "16B", "--overlap", "--json", "--out", str(out)]
    status, printed, log = torchrun([*BENCH, *options])
    assert status == 0, log
    record = finished(printed)
    assert record == json.loads(out.read_text())
    assert record["complete"] and record["stopped"] is None and not record["skipped"]
    assert [(row["op"], row["bytes"]) for row in record["rows"]] == [
        (name, size) for name in OPERATIONS for size in (8, 16)
    ]
    factors = {"all_reduce": 1.0, "broadcast": 1.0}
    for row in record["rows"]:
        assert len(row["seconds"]) == 20
        assert row["median_seconds"] == np.median(row["seconds"]) > 0
        assert row["median_seconds"] <= row["p99_seconds"] <= max(row["seconds"])
        algorithm = row["bytes"] / row["median_seconds"]
        assert row["algorithm_bandwidth_bytes_per_s"] == pytest.approx(algorithm)
        factor = factors.get(row["op"], 0.5)
        assert row["bus_bandwidth_bytes_per_s"] == pytest.approx(algorithm * factor)
        assert [late["rank"] for late in row["stragglers"]] == [0, 1]
        # One clock serves both processes, so the first to arrive is exactly on time somewhere.
        assert min(late["arrives_late_median"] for late in row["stragglers"]) >= 0
        assert row["slowest_rank"] in (None, 0, 1)
        assert len(row["overlap"]["gemm_slowdown"]) == 2
        assert row["overlap"]["gemms"] >= 1
        assert all(x > 0 for x in row["overlap"]["collective_slowdown"])
        if row["joules_per_call"] is None:
            assert row["energy"]["not_measured"]
    footer = record["footer"]
    assert footer["versions"]["torch"] == torch.__version__
    assert footer["devices"][0].startswith("2 x CPU") and len(footer["hosts"]) == 1
    assert str(Path.home()) not in out.read_text() and str(tmp_path) not in out.read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "all_reduce" in log and "late rank" in log  # the table, beside the JSON


def test_ctrl_c_keeps_the_finished_rows(tmp_path):
    out = tmp_path / "bench.json"
    process = start([*BENCH, "--max-bytes", "1GiB", "--ops", "broadcast", "--out", str(out)], 2)
    until = time.monotonic() + TIMEOUT_SECONDS
    while not (out.exists() and len(json.loads(out.read_text())["rows"]) >= 3):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, log = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode != 0
    record = finished(out.read_text())
    assert record["stopped"] == "interrupted" and not record["complete"]
    assert 3 <= len(record["rows"]) < 28
    assert out.with_suffix(".png").exists()
    assert "stopped early: interrupted" in printed
    assert f"finished rows are in {out}" in log


# One bench for three checks: the clock of rank r runs 100 r seconds ahead, three ranks do not
# divide the sizes, and rank 1 dies as the fourth size begins.
THREE_RANKS = """
import json, os, time
from llama2rt import cli
from llama2rt.cluster import bench, timing

rank, clock = int(os.environ["RANK"]), time.perf_counter
timing.time.perf_counter = lambda: clock() + 100.0 * rank
compare_clocks, measure, sizes = timing.compare_clocks, bench.measure, []

def compare_and_tell(control):
    clocks = compare_clocks(control)
    if rank == 0:
        lists = clocks.offset_seconds.tolist(), clocks.uncertainty_seconds.tolist()
        print("clocks", json.dumps(lists), flush=True)
    return clocks

def measure_three(ranks, operation, size, *others):
    sizes.append(size)
    if rank == 1 and len(sizes) == 4:
        os._exit(9)
    return measure(ranks, operation, size, *others)

timing.compare_clocks, bench.measure = compare_and_tell, measure_three
words = "cluster bench --backend gloo --ops all_gather --out"
cli.main([*words.split(), {out!r}])
"""


@pytest.fixture(scope="module")
def three_ranks(torchrun, tmp_path_factory) -> tuple[int, str, str, Path]:
    """Exit status, stdout, stderr and record of that run."""
    folder = tmp_path_factory.mktemp("three-ranks")
    out, program = folder / "bench.json", folder / "rank.py"
    program.write_text(THREE_RANKS.format(out=str(out)))
    return *torchrun([str(program)], ranks=3), out


def test_clocks_are_compared_within_their_uncertainty(three_ranks):
    _, printed, log, out = three_ranks
    told = [line for line in printed.splitlines() if line.startswith("clocks ")]
    assert len(told) == 2, log
    for line in told:
        offsets, uncertainties = json.loads(line.removeprefix("clocks "))
        for rank in range(3):
            assert abs(offsets[rank] - 100.0 * rank) <= uncertainties[rank]
            assert uncertainties[rank] < 10.0
    for row in finished(out.read_text())["rows"]:
        assert all(late["arrives_late_median"] < 20.0 for late in row["stragglers"])


def test_sizes_that_three_ranks_do_not_divide(three_ranks):
    record = finished(three_ranks[3].read_text())
    (skipped,) = record["skipped"]
    assert skipped["reason"] == "less than one fp32 number for each of 3 ranks"
    first, second = record["rows"]
    assert (first["bytes"], second["bytes"]) == (12, 24)  # multiples of 12 below 16 and 32
    assert first["bus_bandwidth_bytes_per_s"] == pytest.approx(12 / first["median_seconds"] * 2 / 3)


def test_a_rank_that_dies_is_an_error_that_keeps_the_rows(three_ranks):
    status, _, log, out = three_ranks
    assert status != 0
    record = finished(out.read_text())
    assert len(record["rows"]) == 2 and not record["complete"]
    # torchrun also stops the survivors; the reason is whichever came first.
    assert record["stopped"].startswith(("interrupted", "a collective failed"))
    assert f"the 2 finished rows are in {out}" in log
    assert "Traceback (most recent call last)" not in log.split("llama2rt cluster: rank 0")[0]


def test_the_late_rank_is_named_only_beyond_what_clocks_leave_open():
    # Three ranks, 20 calls; clock of rank 2 runs 5 s ahead; rank 1 arrives 3 ms late.
    start = np.arange(20.0)[None] + np.array([[0.0], [0.003], [5.0]])
    stamps = np.stack([start, np.broadcast_to(start[:1] + 0.01, (3, 20)).copy()], axis=2)
    stamps[2, :, 1] += 5.0
    sure = timing.Clocks(np.array([0.0, 0.0, 5.0]), np.full(3, 1e-4))
    rows, slowest = timing.stragglers(stamps, sure)
    assert slowest == 1
    assert rows[1].arrives_late_median == pytest.approx(0.003)
    assert rows[1].arrives_late_max == pytest.approx(0.003)
    assert [row.finishes_late_median for row in rows] == pytest.approx([0, 0, 0])
    unsure = timing.Clocks(np.array([0.0, 0.0, 5.0]), np.full(3, 2e-3))
    assert timing.stragglers(stamps, unsure)[1] is None


def test_a_call_lasts_as_long_as_on_its_slowest_rank():
    stamps = np.zeros((2, 20, 2))
    stamps[0, :, 1], stamps[1, :, 1] = 0.001, 0.002
    clocks = timing.Clocks(np.zeros(2), np.zeros(2))
    used = [energy.Energy(1.0, {"GPU-a": 30.0}), energy.Energy(1.0, {"GPU-b": 10.0})]
    row = records.row("all_reduce", 4_000_000, stamps, clocks, used)
    assert row["median_seconds"] == 0.002
    assert row["bus_bandwidth_bytes_per_s"] == pytest.approx(2e9)
    assert row["joules_per_call"] == 2.0


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    yield bench.Ranks(0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


def test_a_size_beyond_memory_is_skipped_with_the_reason(alone, monkeypatch):
    plan = bench.Plan.of(["all_to_all"], "1MiB", "1MiB", 5, 20)
    monkeypatch.setattr(bench, "free_bytes", lambda device: 2 << 20)
    with energy.of_device(alone.device) as meter:
        row = bench.measure(alone, OPERATIONS["all_to_all"], 1 << 20, plan, meter)
        assert row == {"skipped": "a rank's buffers take 2 MiB, 2 MiB are free"}
        monkeypatch.undo()
        row = bench.measure(alone, OPERATIONS["all_to_all"], 1 << 20, plan, meter)
    assert row["bytes"] == 1 << 20 and row["bus_bandwidth_bytes_per_s"] == 0.0


@pytest.mark.parametrize("good_calls", [0, 1 + 5 + 20])
def test_a_wrong_result_is_an_error_and_not_a_row(alone, capsys, good_calls):
    calls = []

    def call(output: torch.Tensor, source: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) > good_calls:  # from the first check on, or only in the last one
            output[3] += 1

    plan = bench.Plan.of(["broadcast"], "64B", "64B", 5, 20)
    wrong = replace(OPERATIONS["broadcast"], call=call)
    with (
        pytest.raises(OSError, match="broadcast of 64 B gave a wrong result"),
        energy.of_device(alone.device) as meter,
    ):
        bench.measure(alone, wrong, 64, plan, meter)
    assert len(calls) == good_calls + 1
    assert "rank 0: broadcast: element 3 is 22.0, not 21.0" in capsys.readouterr().err


def test_what_a_backend_lacks_is_skipped_with_its_words(alone, monkeypatch, tmp_path):
    def lacks(*_: torch.Tensor) -> None:
        raise RuntimeError("ProcessGroupOld does not support alltoall")

    operations = {name: OPERATIONS[name] for name in ("all_to_all", "broadcast")}
    operations["all_to_all"] = replace(operations["all_to_all"], call=lacks)
    monkeypatch.setattr(bench, "OPERATIONS", operations)
    report = bench._Report(records.new(5, 20, "gloo", 1, {}), tmp_path / "out.json", quiet=False)
    plan = bench.Plan.of(list(operations), "8B", "8B", 5, 20)
    with energy.of_device(alone.device) as meter:
        bench._all_rows(alone, plan, meter, report)
    (skipped,) = report.record["skipped"]
    assert skipped["op"] == "all_to_all"
    assert skipped["reason"] == "gloo: ProcessGroupOld does not support alltoall"
    assert [row["op"] for row in report.record["rows"]] == ["broadcast"]


def test_memory_is_shared_by_the_ranks_of_a_host(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = bench.free_bytes(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert bench.free_bytes(cpu) == pytest.approx(whole / 4, rel=0.2)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8", 8), ("8B", 8), ("4KiB", 4096), ("4 KB", 4000), ("8GiB", 8 * 2**30), ("2gb", 2 * 10**9)],
)
def test_binary_and_decimal_units_differ(text, count):
    assert sizes.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "B", "-8B", "8TiB", "1.5MiB", "8 bits"])
def test_no_size_is_bad_input(text):
    with pytest.raises(InputError, match="is no size"):
        sizes.parse_bytes(text)


def test_the_default_plan_is_8_bytes_to_8_gib_doubling():
    plan = bench.Plan.of(list(OPERATIONS), "8B", "8GiB", 5, 20)
    assert plan.sizes == tuple(8 * 2**k for k in range(31))
    assert plan.sizes[-1] == 8 * 2**30


@pytest.mark.parametrize(
    ("smallest", "largest", "warmup", "iterations"),
    [("2B", "8B", 5, 20), ("16B", "8B", 5, 20), ("8B", "8B", 4, 20), ("8B", "8B", 5, 19)],
)
def test_plans_without_meaning_are_bad_input(smallest, largest, warmup, iterations):
    with pytest.raises(InputError, match="expected"):
        bench.Plan.of(["all_reduce"], smallest, largest, warmup, iterations)


def test_one_process_is_told_how_to_start_several(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"torchrun --standalone --no-python --nproc-per-node"):
        bench.bench()


def recorded(seconds: dict[tuple[str, int], list[float]], ranks: int = 2) -> dict:
    clocks = timing.Clocks(np.zeros(ranks), np.zeros(ranks))
    record = records.new(5, 20, "gloo", ranks, {})
    for (operation, size), values in seconds.items():
        ends = np.asarray(values)
        stamps = np.stack([np.zeros((ranks, len(ends))), np.tile(ends, (ranks, 1))], axis=2)
        record["preset"] = None
        record["rows"].append(records.row(operation, size, stamps, clocks, []))
    return record


def test_two_runs_are_compared_where_they_meet(tmp_path, capsys):
    rng = np.random.default_rng(0)
    noise = 1 + 0.1 * rng.random(40)
    fast = recorded({("all_reduce", 8): 1e-3 * noise, ("broadcast", 8): 1e-3 * noise})
    slow = recorded({("all_reduce", 8): 2e-3 * noise[::-1], ("all_reduce", 16): noise})
    for name, record in (("fast", fast), ("slow", slow)):
        records.write(record, tmp_path / f"{name}.json")
    both, out = (tmp_path / "fast.json", tmp_path / "slow.json"), tmp_path / "ratio.json"
    bench.bench(compare=both, out=out, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == printed
    assert out.with_suffix(".png").stat().st_size > 10_000
    (row,) = printed["rows"]
    assert (row["op"], row["bytes"]) == ("all_reduce", 8)
    assert row["ratio"] == pytest.approx(2.0)
    assert 1.9 < row["low"] < 2.0 < row["high"] < 2.1
    (same,) = records.compare(slow, {**slow, "rows": slow["rows"][:1]})["rows"]
    assert same["ratio"] == 1.0 and same["low"] < 1.0 < same["high"]
    assert "all_reduce" in bench_output.comparison(records.compare(fast, slow))


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        draws = {s: {("broadcast", 8): np.exp(0.2 * rng.standard_normal(30)) * s} for s in (1, 2)}
        (row,) = records.compare(recorded(draws[1]), recorded(draws[2]), resamples=500)["rows"]
        covered += row["low"] <= 2.0 <= row["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_runs_that_cannot_be_compared_are_bad_input(tmp_path):
    a = recorded({("all_reduce", 8): [1.0] * 20})
    with pytest.raises(InputError, match="2 and 4 ranks"):
        records.compare(a, recorded({("all_reduce", 8): [1.0] * 20}, ranks=4))
    with pytest.raises(InputError, match="no operation and size in common"):
        records.compare(a, recorded({("all_reduce", 16): [1.0] * 20}))
    other = tmp_path / "other.json"
    for text in ("{}", "[1]", "nonsense"):
        other.write_text(text)
        with pytest.raises(InputError, match=r"other\.json"):
            records.read(other)


def test_one_rank_has_no_bus(alone):
    lines = bench_output.head({"ranks": 1, "backend": "gloo", "dtype": "fp32", "warmup": 5,
                               "iterations": 20, "environment": {}})  # fmt: skip
    assert any("0 by definition" in line for line in lines)
    assert not math.isnan(OPERATIONS["all_reduce"].factor(1))
