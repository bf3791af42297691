"""Power caps against the published results they were fitted to; carbon to the paper's digit."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.cluster import carbon, power_curve
from llama2rt.cluster.estimate import Estimate
from llama2rt.errors import InputError

# Touvron et al. 2023b, table 2.
TABLE_2 = {
    "llama2-7b": (184_320, 400, "31.22"),
    "llama2-13b": (368_640, 400, "62.44"),
    "llama2-34b": (1_038_336, 350, "153.90"),
    "llama2-70b": (1_720_320, 400, "291.42"),
}


def test_table_2_to_the_digit():
    assert [run.model for run in carbon.LLAMA2] == list(TABLE_2)
    for run in carbon.LLAMA2:
        hours, watts, printed = TABLE_2[run.model]
        assert (run.gpu_hours, run.watts) == (hours, watts)
        assert str(carbon.floored(carbon.tco2eq(run))) == printed


def test_the_total_comes_from_the_uncut_rows():
    assert str(carbon.total(carbon.LLAMA2)) == "539.00"
    cut = sum(carbon.floored(carbon.tco2eq(run)) for run in carbon.LLAMA2)
    assert str(cut) == "538.98"
    # Rounding instead of cutting would change two of the four rows.
    rounded = [round(carbon.tco2eq(run), 2) for run in carbon.LLAMA2]
    assert rounded == [Decimal("31.22"), Decimal("62.45"), Decimal("153.91"), Decimal("291.42")]


def test_host_power_comes_on_top():
    host = carbon.with_host(carbon.LLAMA2[0])
    assert host.low == pytest.approx(31.223808 * (400 + 137.5) / 400)
    assert host.high == pytest.approx(31.223808 * (400 + 156.25) / 400)


def test_a_missing_meter_is_said_and_never_zero():
    run = carbon.LLAMA2[0]
    assert carbon.measured(run) is None
    assert carbon.line() == "not measured"
    assert carbon.line(12, 400).startswith("not measured; 2.03 kg CO2eq by the paper's method")
    assert carbon.line(measured_kwh=10).startswith("4.24 kg CO2eq measured")
    assert carbon.of_summary({"loss": 1.5, "energy_kwh": None}) == "not measured"
    assert carbon.of_summary({"energy_kwh": 10}) == carbon.line(measured_kwh=10)
    summary = {"gpu_hours": 12, "gpu_watts": 400.0, "energy_kwh": 3}
    assert carbon.of_summary(summary) == carbon.line(12, 400, 3)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="measured_kwh: expected a positive number"):
            carbon.Run("run", 1.0, 400.0, wrong)
        with pytest.raises(InputError, match="gpu_hours: expected a positive number"):
            carbon.Run("run", wrong, 400.0)


@pytest.mark.parametrize(
    ("workload", "watts", "published"),
    [
        # MLPerf Inference v2.0, A100-SXM-80GB x8: throughput over that at 400 W.
        ("matmul", 300, 0.886),  # BERT int8
        ("matmul", 275, 0.811),  # BERT fp16
        ("mixed", 275, 0.857),  # DLRM
        ("mixed", 250, 0.850),  # RNN-T
        ("mixed", 250, 0.830),  # SSD-ResNet34
        ("mixed", 225, 0.800),  # ResNet50
        ("mixed", 225, 0.863),  # 3D-UNet
    ],
)
def test_the_curve_follows_mlperf(workload, watts, published):
    found = power_curve.relative_throughput(workload, watts)
    assert found.value == pytest.approx(published, rel=0.06)


def test_the_curve_is_the_formula():
    for relative in (0.6, 0.8, 0.9381, 1.0):
        expected = 130 + 270 * relative * (1 - 1.10 * (1 - relative)) ** 2
        assert power_curve.MATMUL.watts(relative) == pytest.approx(expected)
        assert power_curve.MATMUL.relative(expected) == pytest.approx(relative)


@given(
    workload=st.sampled_from(power_curve.WORKLOADS),
    low=st.floats(100, 400),
    high=st.floats(100, 400),
)
def test_a_higher_cap_is_never_slower(workload, low, high):
    low, high = sorted((low, high))
    below, above = (power_curve.relative_throughput(workload, cap) for cap in (low, high))
    assert below.value <= above.value <= 1
    assert below.low <= below.value <= below.high
    assert power_curve.draw_watts(workload, low) <= low


def test_a_cap_above_the_draw_costs_nothing():
    assert power_curve.relative_throughput("memory", 300).value == 1
    assert power_curve.relative_throughput("matmul", 400).value == 1
    assert power_curve.relative_throughput("memory", 250).value < 1
    with pytest.raises(InputError, match="caps of 100-400 W, got 90"):
        power_curve.relative_throughput("matmul", 90)


def test_an_estimate_lies_in_its_range():
    with pytest.raises(ValueError, match="low <= value <= high"):
        Estimate(1.0, 1.1, 2.0, "wrong")
