"""Every figure draws nothing, one point and many, shows its labels, and keeps text text."""

import re

import numpy as np
import pytest

from llama2rt.report import figures, training

RNG = np.random.default_rng(0)


def _estimates(count):
    return [(0.1 + 0.08 * i, 0.05 + 0.08 * i, 0.2 + 0.08 * i) for i in range(count)]


def _curve(count):
    sizes = list(range(1, count + 1))
    return {"n": sizes, "max": np.log1p(sizes).tolist(), "median": [0.5] * count}


def _accuracy(count):
    names = ["significantly_better", "better", "slightly_better", "negligibly_better", "average"]
    return [
        {"rating": name, "mean": 0.8, "low": 0.7, "high": 0.9, "pairs": 50, "ties": 1}
        for name in names[:count]
    ]


def _rows(count):
    return [
        {
            "step": step,
            "loss": 3.0 / step,
            "lr": 1e-4 * step,
            "kl_k1": 0.1 * step,
            "reward": 0.2 * step,
            "chosen_logprob": 0.1 * step,
            "rejected_logprob": -0.1 * step,
            "margin": 0.2 * step,
            "accuracy": 0.5,
            "held_out_loss": 3.5 / step,
            "clipped_values": 0.1,
            "note": "text is not drawn",
        }
        for step in range(1, count + 1)
    ]


DRAW = {
    "accuracy": lambda n: figures.accuracy_by_rating(
        {"helpfulness": _accuracy(min(n, 5)), "safety": _accuracy(min(n, 2))} if n else {}
    ),
    "versions": lambda n: figures.versions(
        [f"V{i}" for i in range(n)], _estimates(n), _estimates(n)
    ),
    "best_of": lambda n: figures.best_of_n({f"V{i}": _curve(n) for i in range(min(n, 9))}),
    "temperatures": lambda n: figures.temperatures(
        {"SFT": {0.2 * (i + 1): _curve(n) for i in range(n)}, "V1": {}} if n else {}
    ),
    "rewards": lambda n: figures.reward_distribution({"SFT": RNG.normal(size=n)} if n else {}),
    "length": lambda n: figures.length_correlation({"RM": np.linspace(-1, 1, n)} if n else {}),
    "wins": lambda n: figures.win_matrix([f"V{i}" for i in range(n)], np.full((n, n), 0.5)),
    "training": lambda n: training.curves(_rows(n)),
    "kl": lambda n: training.kl_against_reward(_rows(n)),
    "margins": lambda n: training.margins(_rows(n)),
}


@pytest.mark.parametrize("count", [0, 1, 12])
@pytest.mark.parametrize("name", DRAW)
@pytest.mark.filterwarnings("error")
def test_draws_nothing_one_and_many(name, count):
    plot = DRAW[name](count)
    svg = plot.svg()
    assert svg.startswith('<svg role="img" aria-label="') and svg.endswith("</svg>")
    assert plot.title and plot.read.endswith(".")
    assert all(len(row) == len(plot.header) for row in plot.rows)
    # An empty figure says so; any other has numbers in its table.
    assert ("no data" in svg or "no metrics" in svg or "no prompt" in svg) == (count == 0)
    assert bool(plot.rows) == bool(count)
    assert "<text" in svg


def _texts(plot):
    return [re.sub(r"<[^>]+>", "", t) for t in re.findall(r"<text.*?</text>", plot.svg(), re.S)]


def test_axes_carry_units_and_names():
    texts = _texts(DRAW["versions"](3))
    assert {"V0", "V1", "V2", "mean helpfulness (0 to 1)", "unsafe answers"} <= set(texts)
    texts = _texts(DRAW["training"](30))
    assert {"loss (nats a target)", "learning rate", "step", "clipped values"} <= set(texts)
    assert "text is not drawn" not in texts and "note" not in texts


def test_numbers_are_those_given():
    plot = DRAW["accuracy"](5)
    assert ("helpfulness", "average", (0.8, 0.7, 0.9), 50, 1) in plot.rows
    assert _texts(plot).count("80") == 7  # one number a bar
    rates = [[np.nan, 0.25], [0.75, np.nan]]
    plot = figures.win_matrix(["SFT", "V1"], rates)
    assert list(plot.rows) == [("SFT", None, 0.25), ("V1", 0.75, None)]
    assert {"25", "75"} <= set(_texts(plot))


def test_names_are_not_read_as_formulas():
    name = "from $5 to $6"
    assert name in _texts(figures.versions([name], _estimates(1), _estimates(1)))


def test_undefined_correlations_are_counted_not_drawn():
    plot = figures.length_correlation({"RM": [0.5, np.nan, 0.1], "none": [np.nan]})
    assert [row[:3] for row in plot.rows] == [("RM", 3, 1), ("none", 1, 1)]
    assert plot.rows[0][3] == pytest.approx(0.3)
    assert "mean +0.30" in _texts(plot) and "undefined" in _texts(plot)


def test_equal_rewards_still_have_a_median():
    plot = figures.reward_distribution({"flat": [1.0] * 5, "empty": [], "one": [2.0]})
    assert [row[0] for row in plot.rows] == ["flat", "one"]
    assert plot.rows[0][2:] == (1.0, 1.0, 1.0, 1.0)
    assert plot.svg()


def test_held_out_values_join_the_panel_of_their_metric():
    rows = [{"step": i, "loss": 1.0 / i, "reward": 1.0} for i in range(1, 30)]
    rows[9]["held_out_loss"] = rows[9]["held_out/reward"] = 2.0
    plot = training.curves(rows)
    assert [axes.get_title(loc="left") for axes in plot.figure.axes] == [
        "loss (nats a target)",
        "reward",
    ]
    assert [row[0] for row in plot.rows] == ["loss", "held_out_loss", "reward", "held_out/reward"]
    assert "held out" in _texts(plot)


def test_steps_are_whole_numbers():
    rows = [{"step": step, "loss": 1.0 * step} for step in (1, 2)]
    (axes,) = [axes for axes in training.curves(rows).figure.axes if axes.lines]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_non_finite_metrics_leave_gaps():
    rows = [{"step": i, "loss": float("nan") if i == 2 else 1.0 * i} for i in range(1, 5)]
    assert training.curves(rows).rows[0][:4] == ("loss", 3, 1.0, 4.0)


def test_a_long_run_makes_a_small_figure_that_keeps_its_spikes():
    rows = [{"step": i, "loss": 1.0 + (i == 7777) * 50} for i in range(100_000)]
    plot = training.curves(rows)
    assert len(plot.svg()) < 120_000
    line = plot.figure.axes[0].lines[0]
    assert len(line.get_xdata()) <= 600
    assert max(line.get_ydata()) == 51.0


def test_running_mean_is_exact_on_a_straight_line():
    values = np.arange(200.0)
    mean, reach = training._running_mean(values)
    np.testing.assert_allclose(mean, values)
    assert reach[0] == reach[-1] == 0 and reach.max() == 5


def test_saved_pictures(tmp_path):
    plot = DRAW["versions"](3)
    plot.save(tmp_path / "a" / "versions.png")
    plot.save(tmp_path / "versions.svg")
    assert (tmp_path / "a" / "versions.png").read_bytes().startswith(b"\x89PNG")
    assert "#20242c" in (tmp_path / "versions.svg").read_text()  # colours, not CSS variables


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    for draw in DRAW.values():
        draw(2).svg()
    assert dict(matplotlib.rcParams) == before
