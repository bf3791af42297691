"""Published runs: what is shipped, how far the model is off, and how bad rows are refused."""

import csv
import io
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt.cluster import calibration, hardware, rows, validate
from llama2rt.cluster.calibration import FITTED
from llama2rt.errors import InputError

SHIPPED = (resources.files("llama2rt.cluster") / "data" / "published_runs.csv").read_text()
CALIBRATION = [row for row in rows.published() if row.split == "calibration"]
HELD_OUT = [row for row in rows.published() if row.split == "validation"]
GOOD = {
    "model": "gpt",
    "dim": "4096",
    "layers": "32",
    "heads": "32",
    "gpus": "16",
    "value": "3000",
}


def text(*cells: dict[str, str]) -> list[str]:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows.COLUMNS + rows.OPTIONAL, restval="")
    writer.writeheader()
    writer.writerows(cells)
    return out.getvalue().splitlines()


def errors(some, constants=FITTED):
    return np.abs([row.error(constants) for row in some])


def test_calibration_rows_are_those_published_and_within_the_bounds():
    assert len(CALIBRATION) == 28
    groups = {row.group for row in CALIBRATION}
    assert groups == {
        "sc21-weak",
        "sc21-zero3",
        "sc21-ptd",
        "sequence-parallel",
        "llm-foundry",
        "llama2",
    }
    found = errors(CALIBRATION)
    assert found.mean() <= 0.05 and found.max() <= 0.12


def test_rows_that_were_never_fitted():
    a100 = [row for row in HELD_OUT if row.cluster.gpu.name != "h100"]
    h100 = [row for row in HELD_OUT if row.cluster.gpu.name == "h100"]
    assert len(a100) == 168 and len(h100) == 95
    assert errors(a100).mean() < 0.065 and np.median(errors(a100)) < 0.04
    assert errors(h100).mean() < 0.095 and errors(h100).max() < 0.30


def test_the_printed_range_holds_most_published_runs():
    inside = []
    for row in HELD_OUT:
        ratio = 1 + row.error(FITTED)  # published over predicted time
        longer = 1 / ratio if row.metric == "step_seconds" else ratio
        inside.append(1 - calibration.FASTER <= longer <= 1 + calibration.SLOWER)
    assert np.mean(inside) > 0.9


def test_every_row_has_a_source_a_split_and_a_unit():
    for row in rows.published():
        assert row.split in ("calibration", "validation") and row.source and row.group
        assert row.metric in rows.METRICS
        assert len({layout.sharding for layout in row.layouts}) == 1


def test_the_constants_are_the_fit():
    pytest.importorskip("scipy")
    found = calibration.fit(CALIBRATION)
    for name in calibration.PRIOR:
        assert getattr(FITTED, name) == pytest.approx(getattr(found, name), abs=6e-4), name
    assert (
        calibration.replace(found, **{n: getattr(FITTED, n) for n in calibration.PRIOR}) == FITTED
    )


def test_each_group_is_predicted_by_the_others():
    pytest.importorskip("scipy")
    left_out = calibration.leave_one_group_out(CALIBRATION)
    assert sum(group.rows for group in left_out) == 28 and len(left_out) == 6
    for group in left_out:
        assert group.mean_error < 0.105 and group.max_error < 0.12, group


def test_required_columns_alone_are_enough():
    # Without interleave, watts and stack, what remains are a row's defaults; who shares a
    # sequence has no default that fits its dp.
    names = [*rows.COLUMNS, "cp"]
    kept = [{k: r[k] for k in names} for r in csv.DictReader(SHIPPED.splitlines())]
    found = rows.read(text(*kept), "rows.csv")
    held_out = [r for r, old in zip(found, rows.published(), strict=True) if old in HELD_OUT]
    fitted = [r for r, old in zip(found, rows.published(), strict=True) if old in CALIBRATION]
    assert errors(fitted).mean() < 0.05
    assert errors(held_out).mean() < 0.075


def test_defaults_of_empty_cells():
    (row,) = rows.read(text(GOOD), "rows.csv")
    shape, layout = row.shape, row.layouts[0]
    assert (shape.kv_heads, shape.ffn_hidden, shape.vocab_size) == (32, 4 * 4096, 51200)
    assert not shape.gated and shape.tied
    assert (row.cluster.gpu.name, row.cluster.fabric.name) == ("a100-80gb", "ib")
    assert (layout.tp, layout.pp, layout.dp, layout.seq) == (1, 1, 16, 2048)
    assert layout.global_batch == 2048 and row.cluster.watts == 400
    assert (layout.sharding, layout.recompute) == ("zero1", "none")
    assert row.metric == "tokens_per_s_per_gpu"
    (row,) = rows.read(text({"model": "llama2-70b", "gpus": "64", "value": "400"}), "rows.csv")
    assert row.shape.gated and row.shape.kv_heads == 8 and row.layouts[0].seq == 4096
    (row,) = rows.read(text({**GOOD, "mlp": "gated"}), "rows.csv")
    assert (row.shape.ffn_hidden, row.shape.vocab_size) == (11008, 32000)
    (row,) = rows.read(text({**GOOD, "gpus": "8"}), "rows.csv")
    assert row.cluster.fabric.name == "nvlink"


@pytest.mark.parametrize(
    ("change", "stack"),
    [
        ({"recompute": "full"}, "2021"),
        ({"recompute": "selective"}, "2021"),
        ({"recompute": "none"}, "2023"),
        ({"recompute": "full", "fabric": "roce"}, "2023"),
        ({"recompute": "full", "mlp": "gated"}, "2023"),
        ({"recompute": "full", "gpu": "h100"}, "2024"),
        ({"sharding": "zero1", "gpu": "h200"}, "2024"),
        ({"sharding": "zero3", "gpu": "H100"}, "2023"),
        ({"sharding": "zero3", "gpu": "h100", "pp": "2"}, "2024"),
        ({"recompute": "full", "sharding": "zero3"}, "2021"),
        ({"recompute": "full", "sharding": "zero3", "gpus": "8"}, "2023"),
        ({"recompute": "full", "sharding": "zero3", "gpu": "a100-40gb"}, "2023"),
        ({"recompute": "full", "sharding": "hybrid"}, "2023"),
        ({"recompute": "full", "sharding": "none", "gpus": "8", "tp": "8"}, "2021"),
        ({"recompute": "none", "stack": "2021"}, "2021"),
    ],
)
def test_the_software_a_row_implies(change, stack):
    (row,) = rows.read(text({**GOOD, **change}), "rows.csv")
    assert {layout.stack for layout in row.layouts} == {stack}


def test_a_default_batch_fills_every_rank():
    cells = {**GOOD, "gpus": "1024", "micro_batch": "16"}
    (row,) = rows.read(text(cells), "rows.csv")
    assert row.layouts[0].global_batch == 16 * 1024


def test_context_parallelism_is_a_column():
    cells = {**GOOD, "tp": "2", "cp": "4", "micro_batch": "1", "sharding": "zero1"}
    (row,) = rows.read(text(cells), "rows.csv")
    assert (row.layouts[0].cp, row.layouts[0].dp) == (4, 2)
    (without,) = rows.read(text({**cells, "cp": ""}), "rows.csv")
    assert without.layouts[0].dp == 8


ANY = {
    "model": ["", "gpt", "llama2-7b", "llama3-8b"],
    "dim": ["768", "4096", "12288"],
    "layers": ["1", "12", "96"],
    "heads": ["12", "32", "96"],
    "kv_heads": ["", "1", "8"],
    "ffn_hidden": ["", "100", "11008"],
    "mlp": ["", "gated", "plain"],
    "vocab": ["", "1", "250880"],
    "seq": ["", "1", "4096", "131072"],
    "gpus": ["1", "7", "8", "64", "2048", "100000"],
    "gpu": ["", *hardware.GPUS],
    "fabric": ["", "nvlink", "ib", "roce"],
    "tp": ["", "1", "4", "16"],
    "pp": ["", "1", "3", "8"],
    "cp": ["", "2"],
    "sharding": ["", "none", "zero1", "zero3", "hybrid"],
    "micro_batch": ["", "1", "7"],
    "global_batch": ["", "1", "1000"],
    "recompute": ["", "none", "selective", "full"],
    "metric": ["", *rows.METRICS],
    "stack": ["", "2021", "2023", "2024"],
}


@settings(max_examples=400, deadline=None)
@given(cells=st.fixed_dictionaries({name: st.sampled_from(few) for name, few in ANY.items()}))
def test_any_cells_are_refused_by_name_or_give_a_sensible_step(cells):
    try:
        (row,) = rows.read(text({**cells, "value": "100"}), "rows.csv")
    except InputError as error:
        assert str(error).startswith("rows.csv:2: ")
        return
    assert 0 < row.predict(FITTED) < float("inf")
    layout, seconds = row.fastest(FITTED)
    flops = row.shape.step_flops(layout.global_batch * layout.seq, layout.seq, layout.recompute)
    assert flops / seconds / row.cluster.gpus < 0.9 * row.cluster.gpu.peak_flops_per_s


def test_newer_pipelines_interleave_unless_the_row_says_otherwise():
    cells = {**GOOD, "pp": "4", "micro_batch": "1", "gpu": "h100"}
    for change, chunks in (
        ({}, 8),
        ({"interleave": "2"}, 2),
        ({"layers": "30"}, 7),
        ({"gpu": "a100-80gb", "recompute": "none"}, 8),
        ({"gpu": "a100-80gb", "recompute": "full"}, 1),
        ({"pp": "1"}, 1),
    ):
        (row,) = rows.read(text({**cells, **change}), "rows.csv")
        assert row.layouts[0].interleave == chunks, change


def test_defaults_never_read_the_published_value():
    for value in ("1", "3000", "1e9"):
        (row,) = rows.read(text({**GOOD, "value": value}), "rows.csv")
        (other,) = rows.read(text(GOOD), "rows.csv")
        assert row.predict(FITTED) == other.predict(FITTED)


def test_metrics_agree_with_each_other():
    found = {}
    for metric in rows.METRICS:
        (row,) = rows.read(text({**GOOD, "metric": metric, "micro_batch": "2"}), "rows.csv")
        found[metric] = row.predict(FITTED)
    tokens = 2048 * 2048
    assert found["tokens_per_s_per_gpu"] == pytest.approx(tokens / found["step_seconds"] / 16)
    flops = row.shape.step_flops(tokens, 2048, "none")
    assert found["tflops_per_gpu"] == pytest.approx(flops / found["step_seconds"] / 16 / 1e12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": "x"}, "dim: expected a whole number, got 'x'"),
        ({"dim": "0"}, "dim: expected 1 to 1e+12, got 0"),
        ({"layers": "9" * 400}, "layers: expected 1 to 1e+12, got 999"),
        ({"dim": ""}, "dim: empty"),
        ({"gpus": ""}, "gpus: empty"),
        ({"value": ""}, "value: empty, expected a number"),
        ({"value": "-3"}, "value: expected a number from 1e-12 to 1e+12, got -3"),
        ({"value": "nan"}, "value: expected a number from 1e-12 to 1e+12, got nan"),
        ({"value": "5e-324"}, "value: expected a number from 1e-12 to 1e+12, got 5e-324"),
        ({"gpu": "v100"}, "gpu: expected one of a100-40gb, a100-80gb, h100, h200, got 'v100'"),
        ({"cp": "3"}, "gpus: tp 1 x pp 1 x dp 5 x cp 3 = 15, expected 16"),
        ({"fabric": "pigeon"}, "fabric: expected one of nvlink, ib, roce, got 'pigeon'"),
        ({"fabric": "nvlink"}, "fabric: nvlink joins the 8 GPUs of a node, got 16"),
        ({"mlp": "round"}, "mlp: expected gated | plain, got 'round'"),
        ({"sharding": "zero2"}, "sharding: expected none | zero1 | zero3 | hybrid, got 'zero2'"),
        ({"recompute": "some"}, "recompute: expected none | selective | full, got 'some'"),
        ({"metric": "speed"}, "metric: expected tokens_per_s_per_gpu | tflops_per_gpu"),
        ({"tp": "3"}, "gpus: tp 3 x pp 1"),
        ({"dp": "4"}, "gpus: tp 1 x pp 1 x dp 4 x cp 1 = 4, expected 16"),
        ({"heads": "5"}, "heads: expected a divisor of dim 4096, got 5"),
        ({"kv_heads": "5"}, "kv_heads: expected a divisor of heads 32, got 5"),
        ({"global_batch": "8"}, "global_batch: 8 sequences"),
        (
            {"micro_batch": "999", "global_batch": "2048"},
            "micro_batch: 999 sequences on each of 16 ranks",
        ),
        ({"watts": "900"}, "watts: a100-80gb takes caps of 100-400 W, got 900"),
    ],
)
def test_bad_cells_are_named_by_file_and_line(tmp_path, change, message):
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(text(GOOD, {**GOOD, **change})) + "\n")
    with pytest.raises(InputError) as caught:
        rows.read_file(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model,gpus"], "x:1: no column value"),
        (["gpus,value,gpus", "1,2,3"], "x:1: column gpus stands there twice"),
        (["gpus,value", "8"], "x:2: 1 cells, expected 2"),
        ([], "x:1: no column gpus and no column value"),
        (["model,gpus,value", "llama2-7b,8,3000", f"x,8,{'9' * 200_000}"], "x:3: field larger"),
    ],
)
def test_bad_tables_are_named(lines, message):
    with pytest.raises(InputError, match=message):
        rows.read(lines, "x")


def test_unknown_columns_are_left_out_loudly(caplog):
    lines = ["model,gpus,value,colour", "llama2-7b,8,3000,blue", ""]
    (row,) = rows.read(lines, "runs.csv")
    assert row.shape.name == "llama2-7b"
    assert "runs.csv:1: column 'colour' is unknown" in caplog.text


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        rows.read_file(tmp_path / "nowhere.csv")
    (tmp_path / "header.csv").write_text("gpus,value\n")
    with pytest.raises(InputError, match=r"header\.csv: no rows"):
        rows.read_file(tmp_path / "header.csv")


def test_the_pages_say_what_the_model_says():
    pages = Path(__file__).resolve().parents[2] / "docs"
    model, validation = (
        (pages / name).read_text() for name in ("cluster.md", "cluster-validation.md")
    )
    for name in calibration.PRIOR:
        assert f"| {name} | {getattr(FITTED, name)} |" in model
    for gpu in hardware.GPUS.values():
        (line,) = (x for x in model.splitlines() if x.startswith(f"| {gpu.name} |"))
        for figure in (
            gpu.peak_flops_per_s // 1e12,
            gpu.memory_bandwidth_bytes_per_s / 1e12,
            gpu.max_watts,
        ):
            assert f" {figure:g} |" in line, figure
        assert f"{gpu.attention_share_2023:.3g}" in line
    assert f"{len(rows.published())} published runs" in model

    def stated(label, some):
        found = errors(some)
        mean, worst = f"{100 * found.mean():.1f} %", f"{100 * found.max():.1f} %"
        (line,) = (x for x in validation.splitlines() if x.startswith(f"| {label}"))
        assert f"| {len(some)} | {mean}" in line and line.endswith(f"| {worst} |"), (mean, worst)

    def of(group):
        return [row for row in HELD_OUT if row.group == group]

    stated("calibration", CALIBRATION)
    unseen = [row for row in HELD_OUT if row.group.endswith("unseen")]
    a100 = [row for row in HELD_OUT if row.cluster.gpu.name != "h100"]
    stated("held out, A100", a100)
    stated("held out, H100", [r for r in HELD_OUT if r not in a100 and r not in unseen])
    stated("unseen: NeMo", of("nemo-h100-unseen"))
    stated("unseen: JAX", of("jax-h100-unseen"))


def test_errors_by_group():
    checked = validate.check(CALIBRATION)
    groups = validate.by_group(checked)
    whole = validate.errors(checked)
    assert sum(group["rows"] for group in groups.values()) == 28
    assert whole["max_error"] == max(group["max_error"] for group in groups.values())
    mean = sum(g["rows"] * g["mean_error"] for g in groups.values()) / 28
    assert whole["mean_error"] == pytest.approx(mean)
