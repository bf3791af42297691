"""Sections of versions: what is there is drawn, what is absent is not, and nothing warns."""

import json
import re

import pytest

from llama2rt.report import figures, html, versions

pytestmark = pytest.mark.filterwarnings("error")


def _estimate(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _row(name, i, worth=None, **more):
    """A version of prompts of one kind, with the judge's worth where there is one."""
    kind = {"prompts": 4, "score": _estimate(0.65)}
    if worth is not None:
        kind["worth"] = more["worth"] = _estimate(worth)
    return {
        "name": name,
        "prompts": 4,
        "samples": 2,
        "temperature": 1.0,
        "reward": _estimate(0.5 + i),
        "scores": {"helpfulness": _estimate(0.6)},
        "kinds": {"helpfulness": kind},
        "tokens": _estimate(19.0),
        "words": _estimate(12.0),
        "cut_share": _estimate(0.2),
        **more,
    }


def _accuracy(mean, pairs=40):
    return {**_estimate(mean), "pairs": pairs, "ties": 0}


def _bin(at, **more):
    return {**_estimate(at), **more}


WINS = {"names": ["SFT", "V1"], "row_over_column": [[None, 0.25], [0.75, None]]}
CURVE = {"n": [1, 2, 4], "max": [0.0, 0.5, 0.9], "median": [0.0, 0.1, 0.2]}
POINT = {"n": [1], "max": [0.0], "median": [0.0]}
NUMBERS = {
    "versions": [
        _row("SFT", 0, worth=0.4),
        _row(
            "V1",
            1,
            worth=0.7,
            kl={"k1": _estimate(2.0), "k3": {"mean": 2.1, "low": None, "high": None}},
        ),
    ],
    "win_rates": WINS,
    "reward_win_rates": WINS,
    "length_correlation": {
        "SFT": {**_estimate(0.2), "undefined": 1, "per_prompt": [0.1, 0.3, None]},
        "V1": {"mean": None, "low": None, "high": None, "undefined": 2, "per_prompt": [None, None]},
    },
    "reward_against_judge": {
        "helpfulness": {
            "SFT": {
                "bins": [_bin(0.3, reward=-1.0, responses=9), _bin(0.6, reward=1.0, responses=11)],
                "pooled": {**_estimate(0.55), "undefined": 0},
                "per_prompt": {"mean": None, "low": None, "high": None, "undefined": 3},
            }
        }
    },
    "best_of": {"SFT": {"0.7": CURVE, "1.0": CURVE}, "V1": {"1.0": CURVE}},
    "reward_models": {
        "helpfulness": {
            "accuracy": {"average": 0.7},
            "intervals": [{"rating": "average", **_accuracy(0.7)}],
            "sources": {"hh": _accuracy(0.7), "shp": _accuracy(0.6)},
            "calibration": {
                "bins": [_bin(0.3, predicted=0.25, pairs=20), _bin(0.8, predicted=0.75, pairs=60)],
                "error": 0.05,
                "pairs": 80,
            },
        },
        "safety": {"intervals": [{"rating": "average", **_accuracy(0.8)}]},
    },
    "drift": {
        "helpfulness": {
            "SFT": {"after": _accuracy(0.8)},
            "V1": {
                "before": _accuracy(0.6, 30),
                "after": _accuracy(0.75, 30),
                "change": _estimate(0.15),
            },
        }
    },
    "seconds": 3.0,
}


def _texts(plot):
    return [re.sub(r"<[^>]+>", "", t) for t in re.findall(r"<text.*?</text>", plot.svg(), re.S)]


def _titles(sections):
    return {
        section.title: [block.title for block in section.blocks if hasattr(block, "svg")]
        for section in sections
    }


def test_everything_is_drawn_and_survives_a_report_json():
    titles = _titles(versions.sections(NUMBERS))
    assert titles == {
        "Versions": [
            "Versions, first to last",
            "Win rates between versions, by the judge",
            "Win rates between versions, by reward",
            "Reward of each version against its KL",
        ],
        "Reward against the judge": ["Reward against the judge"],
        "Reward models": [
            "Reward-model accuracy by rating",
            "Reward-model accuracy by source",
            "Calibration of the reward models",
            "Reward models on each batch, before and after its refresh",
            "Reward-length correlation",
        ],
        "More samples": [
            "Max and median reward among N samples",
            "Max reward against N, by temperature",
        ],
    }
    read_back = versions.sections(json.loads(json.dumps(NUMBERS)))
    pages = [html.page("Versions", found) for found in (versions.sections(NUMBERS), read_back)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), {}),
        (("seconds",), {}),
        (("reward_win_rates",), {"Versions": ["Win rates between versions, by reward"]}),
        (
            ("drift",),
            {"Reward models": ["Reward models on each batch, before and after its refresh"]},
        ),
        (("length_correlation",), {"Reward models": ["Reward-length correlation"]}),
    ],
)
def test_what_is_absent_is_not_drawn(present, expected):
    assert _titles(versions.sections({key: NUMBERS[key] for key in present})) == expected


def test_without_a_judge_a_safety_model_or_kl():
    numbers = {"versions": [_row("SFT", 0)], "length_correlation": {}, "reward_models": {}}
    (section,) = versions.sections(numbers)
    plot, table, details = section.blocks
    assert list(plot.header) == ["version", "reward", "response length (tokens)"]
    assert list(table.header) == ["version", "reward", "response length (tokens)"]
    assert list(details.header) == [
        "version",
        "Rc on helpfulness prompts",
        "helpfulness score",
        "words",
        "cut short",
    ]
    assert "KL" not in details.caption


def test_a_plans_own_columns_and_notes_come_first():
    rows = [_row("SFT", 0, worth=0.4, unsafe=_estimate(0.3)), _row("V1", 1, worth=0.5)]
    (section,) = versions.sections(
        {"versions": rows},
        columns=[versions.Column("unsafe", "unsafe answers", share=True)],
        notes={versions.VERSIONS: "Six prompts.", versions.JUDGE: "Not shown."},
    )
    assert section.text == "Six prompts."
    plot, table, _ = section.blocks
    # In place of the worth, which they spell out.
    assert list(table.header)[:3] == ["version", "unsafe answers", "reward"]
    assert [row[1] for row in table.rows] == [pytest.approx((0.3, 0.2, 0.4)), None]
    assert "30.0 %" in _texts(plot) and "unsafe answers" in _texts(plot)


def test_worth_is_shown_by_kind_where_there_are_several():
    (section,) = versions.sections({"versions": [_row("V1", 0, worth=0.4)]})
    assert list(section.blocks[1].header)[1] == "worth by the judge"
    row = _row("V1", 0, worth=0.4)
    row["kinds"]["safety"] = {"prompts": 2, "score": _estimate(0.1), "worth": _estimate(1.8)}
    (section,) = versions.sections({"versions": [row]})
    assert list(section.blocks[1].header)[1:3] == [
        "worth by the judge, helpfulness prompts",
        "worth by the judge, safety prompts",
    ]
    assert section.blocks[1].rows[0][2] == pytest.approx((1.8, 1.7, 1.9))


def test_numbers_are_those_given():
    found = {section.title: section.blocks for section in versions.sections(NUMBERS)}
    details = found["Versions"][2]
    assert [row[-2:] for row in details.rows] == [(None, None), ((2.0, 1.9, 2.1), 2.1)]
    kl = found["Versions"][-1]
    assert [tuple(row) for row in kl.rows] == [("V1", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6))]
    correlations = found["Reward against the judge"][1]
    assert correlations.rows == [("helpfulness", "SFT", pytest.approx((0.55, 0.45, 0.65)), None, 3)]
    drift = found["Reward models"][3]
    assert [tuple(row[:2]) for row in drift.rows] == [("helpfulness", "SFT"), ("helpfulness", "V1")]
    assert drift.rows[0][2] is None and drift.rows[1][2] == pytest.approx((0.6, 0.5, 0.7))
    assert drift.rows[1][4] == pytest.approx((0.15, 0.05, 0.25)) and drift.rows[1][5] == 30
    assert {"80", "60", "75", "helpfulness"} <= set(_texts(drift))
    # The version without a defined correlation is left out, prompts without one are not counted.
    length = found["Reward models"][4]
    assert [row[:3] for row in length.rows] == [("SFT", 3, 1)]


def test_curves_are_named_by_temperature_where_versions_differ():
    (section,) = versions.sections({"best_of": {"SFT": {"1.0": CURVE}, "V1": {"0.7": CURVE}}})
    (plot,) = section.blocks
    assert {"SFT (T = 1), max", "V1 (T = 0.7), max"} <= set(_texts(plot))
    # One sample has no curve to draw.
    assert versions.sections({"best_of": {"SFT": {"1.0": POINT}}}) == []


DRAW = {
    "by_version": lambda n: figures.by_version(
        [f"V{i}" for i in range(n)],
        [
            figures.Panel("some", [(0.1 * i, 0.1 * i, 0.1 * i) for i in range(n)], share=True),
            figures.Panel("gaps", [None if i else (-5.0, -6.0, 1e4) for i in range(n)]),
            figures.Panel("none", [None] * n),
        ],
    ),
    "reward_by_kl": lambda n: figures.reward_by_kl(
        [f"V{i}" for i in range(n)], [(i, i, i + 1) for i in range(n)], [(0.0, 0.0, 0.0)] * n
    ),
    "reward_against_judge": lambda n: figures.reward_against_judge(
        {
            kind: {
                f"V{i}": [_bin(0.1 * j, reward=j, responses=5) for j in range(n - i)]
                for i in range(min(n, 9))
            }
            for kind in ("helpfulness", "safety")
        }
    ),
    "accuracy_by_source": lambda n: figures.accuracy_by_source(
        {f"model {i}": {f"source {j}": _accuracy(0.6) for j in range(n - i)} for i in range(n)}
    ),
    "calibration": lambda n: figures.calibration(
        {
            f"model {i}": {"bins": [_bin(0.5, predicted=0.5, pairs=9)], "error": 0, "pairs": 9}
            for i in range(n)
        }
    ),
    "drift": lambda n: figures.drift(
        {
            f"model {i}": {f"batch {j}": {"after": _accuracy(0.6)} for j in range(n)}
            for i in range(min(n, 2))
        }
    ),
}


@pytest.mark.parametrize("count", [0, 1, 12])
@pytest.mark.parametrize("name", DRAW)
def test_draws_nothing_one_and_many(name, count):
    plot = DRAW[name](count)
    assert ("no data" in plot.svg()) == (count == 0)
    assert bool(plot.rows) == bool(count) and plot.read.endswith(".")
    assert all(len(row) == len(plot.header) for row in plot.rows)


def test_more_reward_models_than_colours_are_drawn():
    rows = [{"rating": "average", **_accuracy(0.7)}]
    plot = figures.accuracy_by_rating({f"refresh {i}": rows for i in range(10)})
    assert len(plot.rows) == 10 and _texts(plot).count("70") == 10


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.68, 0.0, -0.25], ["0.680", "0.000", "\N{MINUS SIGN}0.250"]),
        ([1.4, -0.6, 2.0], ["1.40", "\N{MINUS SIGN}0.60", "2.00"]),
        ([19.0, 312.2], ["19", "312"]),
    ],
)
def test_numbers_beside_dots_look_alike(values, shown):
    panel = figures.Panel("x", [(value, value, value) for value in values])
    plot = figures.by_version([f"V{i}" for i in range(len(values))], [panel])
    assert [text for text in _texts(plot) if text in shown] == shown


def test_only_the_newest_batch_shows_what_a_refresh_was_for():
    assert versions.newest_batch({"one": 1, "two": 2}) == {"two": 2}
    assert versions.newest_batch({}) == {}
