"""`llama2rt cluster` as users and programs meet it: JSON, exit statuses, tables, figures."""

import json
import subprocess
import sys

import pytest

from llama2rt import cli
from llama2rt.cluster import rows


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command in this process: (status, stdout, stderr)."""
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main(["cluster", *map(str, arguments)])
            raise SystemExit(0)
        seen = capsys.readouterr()
        return left.value.code, seen.out, seen.err

    return run


@pytest.fixture
def ask(call):
    """The JSON object of a command that must succeed."""

    def run(*arguments):
        status, out, _ = call(*arguments, "--json")
        assert status == 0
        assert len(out.splitlines()) == 1
        return json.loads(out)

    return run


def test_carbon(ask, call):
    found = ask("carbon")
    assert [row["tco2eq"] for row in found["rows"]] == [31.22, 62.44, 153.90, 291.42]
    assert [row["watts"] for row in found["rows"]] == [400, 400, 350, 400]
    assert sum(row["gpu_hours"] for row in found["rows"]) == 3_311_616
    assert found["total_tco2eq"] == 539.00
    assert all(row["tco2eq_measured"] is None for row in found["rows"])
    _, out, _ = call("carbon")
    assert "539.00" in out and "153.90" in out and "not measured" in out and "rounded" in out
    (row,) = ask("carbon", "--gpu-hours", 10, "--watts", 400, "--measured-kwh", 3)["rows"]
    assert row["tco2eq_measured"] == pytest.approx(3 * 0.4235 / 1000)


def test_collective(ask, call):
    large = ask("collective", "--op", "all_reduce", "--gpus", 64, "--bytes", "8GiB")
    assert large["bytes"] == 2**33 and large["algorithm"] == "ring"
    assert 185e9 < large["bus_bandwidth_bytes_per_s"] < 200e9
    small = ask("collective", "--gpus", 8, "--bytes", 1024, "--fabric", "nvlink")
    assert 30e-6 < small["seconds"] < 40e-6 and small["protocol"] == "LL"
    roce = ask("collective", "--gpus", 64, "--bytes", 2**33, "--fabric", "roce")
    assert roce["seconds"] > large["seconds"]
    assert ask("collective", "--gpus", 64, "--bytes", "8 gib")["bytes"] == 2**33
    _, out, _ = call("collective", "--gpus", 64, "--bytes", "1MB")
    assert "chosen" in out and "1,000,000 bytes" in out


def test_compare(ask, call, tmp_path):
    found = ask("compare", "--model", "llama2-70b", "--gpus", 2048)
    ratio = found["ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    shares = {step["cause"]: step["share"] for step in found["waterfall"]}
    assert sum(shares.values()) == pytest.approx(1 - ratio["value"], abs=1e-12)
    assert "residual" in shares
    assert found["unexplained"] == pytest.approx(ratio["value"] - 0.9)
    assert found["note"] == "No public sweep of LLM training at 350 W exists."
    same = ("--fabrics", "roce", "roce", "--watts", 350, 350)
    assert ask("compare", "--model", "llama2-7b", "--gpus", 64, *same)["ratio"]["value"] == 1.0
    path = tmp_path / "gap.png"
    status, out, _ = call("compare", "--model", "llama2-7b", "--gpus", 64, "--figure", path)
    assert status == 0 and path.read_bytes().startswith(b"\x89PNG")
    assert "No public sweep of LLM training" in " ".join(out.split())


def test_caps_that_are_compared_are_the_papers_share_of_the_largest(ask):
    for gpu, watts in (("a100-80gb", (400, 350)), ("h200", (700, 612.5))):
        found = ask("compare", "--model", "llama2-7b", "--gpus", 64, "--gpu", gpu)
        assert (found["first"]["watts"], found["second"]["watts"]) == watts


def test_compare_covers_all_sizes(ask):
    cases = ask("compare")["cases"]
    assert {(c["model"], c["gpus"]) for c in cases} >= {("llama2-70b", 100_000), ("llama2-7b", 8)}
    missing = [(c["model"], c["gpus"]) for c in cases if c["ratio"] is None]
    assert missing == [("llama2-70b", 8)]  # 16 bytes a parameter do not fit into 8 x 80 GB
    assert all(("no layout fits" in c.get("reason", "")) == (c["ratio"] is None) for c in cases)


def test_ecmp_and_power(ask, call, tmp_path):
    assert ask("ecmp", "--flows", 4, "--uplinks", 16)["efficiency"] == pytest.approx(
        0.508, abs=0.01
    )
    found = ask("power", "--workload", "matmul", "--watts", 350)
    assert found["relative_throughput"] == pytest.approx(0.938, abs=0.001)
    assert found["low"] <= found["relative_throughput"] <= found["high"]
    # What the fit has not seen says so.
    assert "scaled" not in found["provenance"] and "extrapolated" not in found["provenance"]
    low = ask("power", "--gpu", "h200", "--watts", 300)["provenance"]
    assert "scaled to 700 W" in low and "extrapolated below 393.75 W" in low
    status, out, _ = call("power", "--figure", tmp_path / "caps.svg")
    assert status == 0 and "93.8%" in out and "No public sweep" in out
    assert "<svg" in (tmp_path / "caps.svg").read_text()


def test_search(ask, call):
    found = ask("search", "--model", "llama2-70b", "--gpus", 2048, "--keep", 3)
    assert len(found["layouts"]) == 3
    best = found["layouts"][0]
    assert best["layout"]["gpus"] == 2048
    assert best["memory_bytes"]["value"] < 80 * 2**30
    assert best["gpu_hours"]["low"] < best["gpu_hours"]["value"] < best["gpu_hours"]["high"]
    status, out, _ = call("search", "--gpus", 64, "--keep", 1)
    assert status == 0 and "tCO2eq" in out


def test_validate(ask, call, tmp_path):
    found = ask("validate")
    assert found["mean_error"] <= 0.05 and found["max_error"] <= 0.12
    assert {row["split"] for row in found["rows"]} == {"calibration"}
    assert {row["split"] for row in found["held_out"]["rows"]} == {"validation"}
    for row in found["rows"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1)
        assert row["source"] and row["group"] and row["metric"]
        assert {"tp", "pp", "dp", "sharding", "micro_batch"} <= set(row["layout"])
        assert isinstance(row["fits"], bool)
    path = tmp_path / "runs.csv"
    columns = ",".join(rows.COLUMNS)
    line = "gpt,4096,36,32,32,16384,plain,51200,2048,128,a100-80gb,ib,4,1,32,none,4,512,full"
    path.write_text(f"{columns}\n{line},tflops_per_gpu,142\n")
    mine = ask("validate", "--rows", path)
    assert len(mine["rows"]) == 1 and mine["max_error"] < 0.05 and "held_out" not in mine
    path.write_text(f"{columns}\n{line},tflops_per_gpu,fast\n")
    status, out, err = call("validate", "--rows", path, "--json")
    assert (status, out) == (2, "")
    assert f"{path}:2: value: expected a number, got 'fast'" in err
    figure = tmp_path / "parity.pdf"
    status, out, _ = call("validate", "--figure", figure)
    assert status == 0 and "never fitted" in out and figure.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["carbon", "--gpu-hours", "5"], "--gpu-hours and --watts"),
        (["carbon", "--measured-kwh", "5"], "--measured-kwh: needs"),
        (["collective", "--gpus", "9", "--bytes", "1"], "multiple of 8, got 9"),
        (["collective", "--gpus", "8", "--bytes", "many"], "is no size: expected a number"),
        (["collective", "--gpus", "8", "--bytes", "0"], "bytes: expected at least 1"),
        (["collective", "--gpus", "16", "--bytes", "8", "--fabric", "nvlink"], "ends at a node"),
        (["collective", "--gpus", "8", "--bytes", "8", "--gpu", "k80"], "gpu: expected one of"),
        (["compare", "--model", "gpt5", "--gpus", "8"], "model: expected one of"),
        (["compare", "--model", "llama2-70b", "--gpus", "8"], "no layout fits"),
        (["compare", "--model", "llama2-7b", "--gpus", "13"], "on 13 GPUs: no layout splits 32"),
        (["search", "--gpus", "7"], "on 7 GPUs: no layout splits 80 layers, 64 heads"),
        (["compare", "--figure", "a.png"], "--figure: draws one case"),
        (["power", "--watts", "900"], "caps of 100-400 W, got 900"),
        (["power", "--figure", "a.docx"], "--figure: expected a file ending in"),
        (["ecmp", "--flows", "0", "--uplinks", "16"], "flows: expected at least 1"),
        (["search", "--tokens", "-1"], "--tokens: expected a positive number"),
        (["search", "--keep", "0"], "--keep: expected at least 1"),
        (["search", "--global-batch", "0"], "--global-batch: expected at least 1, got 0"),
        (["carbon", "--gpu-hours", "1e308", "--watts", "1"], "number below 1e+12, got 1e+308"),
        (["power", "--gpu", "h100", "--figure", "a.png"], "draws an A100's curves, got --gpu h100"),
        (["validate", "--rows", "nowhere.csv"], "nowhere.csv"),
        (["guess"], "unknown subcommand 'guess'"),
    ],
)
def test_bad_input_ends_with_status_2(call, arguments, message):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("name", sorted(cli.CLUSTER))
def test_every_subcommand_has_help(call, name):
    status, out, _ = call(name, "--help")
    assert status == 0 and "--json" in out and len(out) > 300


def test_the_overview_lists_them(call):
    status, out, _ = call("--help")
    assert status == 0 and all(name in out for name in cli.CLUSTER)
    assert call()[0] == 2


def test_the_models_load_no_torch():
    program = """
import sys
from llama2rt import cli
try:
    cli.main(["cluster", "validate", "--json"])
except SystemExit as left:
    assert not left.code, left.code
print([name for name in ("torch", "scipy", "matplotlib") if name in sys.modules])
"""
    out = subprocess.check_output([sys.executable, "-P", "-c", program], text=True)
    assert out.splitlines()[-1] == "[]"
