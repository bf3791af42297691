"""The page of a study and its tables as text, from numbers."""

import re
from dataclasses import replace

import numpy as np
import pytest

from llama2rt.data.records import RATINGS, SAFETY, Comparison
from llama2rt.evaluate import annotators, reward_models
from llama2rt.report import html, studies


@pytest.fixture(scope="module")
def numbers():
    """A safety and a helpfulness model on a test set of each, the first judged by two raters."""
    asked = [{"role": "user", "content": "which?"}]
    pairs = [
        Comparison(asked, "this", f"that {i // 2}", RATINGS[i % 4], SAFETY[i % 3], "safety")
        for i in range(24)
    ]
    votes = [replace(pair, rater=str(i % 2)) for i, pair in enumerate(pairs)]
    generator = np.random.default_rng(0)
    scores = {
        name: [(gap + generator.normal(size=24), generator.normal(size=24)) for _ in range(2)]
        for name, gap in (("ranking alone", 0.5), ("with <classification>", 3.0))
    }
    safe = reward_models.compare(scores, pairs)
    plain = reward_models.compare(scores, [Comparison(asked, "a", f"b{i}") for i in range(24)])
    row = safe["models"]["ranking alone"]["intervals"][-1]
    return {
        "study": {
            "models": {},
            "draw": ["with <classification>"],
            "seeds": [0, 1],
            "trainings": 4,
            "left_out": {"plain": 5},
        },
        "tests": {
            "safety": safe | {"annotators": annotators.agreement(votes)},
            "plain": plain | {"unread": {"ranking alone": 2}},
        },
        "scaling": {"safety": {"small": [{"comparisons": n, **row} for n in (100, 200)]}},
        "length": {
            "models": {
                "a": {"mean": 0.2, "low": 0.1, "high": 0.3, "undefined": 1, "unread": 0}
                | {"per_prompt": [0.2, None, 0.3]},
                "b": {"mean": None, "low": None, "high": None, "undefined": 3, "unread": 0}
                | {"per_prompt": [None] * 3},
            },
            "prompts": 3,
            "samples": 8,
            "tokens": 12.0,
            "cut_share": 0.25,
        },
    }


def test_every_number_is_a_table_and_a_figure(numbers):
    page = html.page("A study", studies.sections(numbers))
    assert page.count("<svg") == 7  # two of each test set, one across them, of data, of length
    assert "with &lt;classification&gt;" in page and "<classification>" not in page
    for expected in (
        "Test set: safety",
        "24 held-out pairs; means over 2 training seeds.",
        "5 pairs left out, on whose prompts a model is trained; 2 left out that ranking alone",
        "annotators among themselves",
        "unsafe responses found",
        "Across test sets",
        "Accuracy against data: safety",
        "8 answers to each of 3 prompts, 12 tokens long on average, 25.0 % cut",
    ):
        assert expected in page, expected


def test_tables_as_text(numbers):
    text = studies.markdown(numbers)
    (header,) = re.findall(r"^\| reward model \| significantly better.*$", text, re.MULTILINE)
    assert header.endswith("| slightly better | negligibly better | average |")
    mean = numbers["tests"]["safety"]["models"]["ranking alone"]["intervals"][-1]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("| ranking alone |"))
    assert f"{mean:.3f} [" in row
    assert "| pairs | 6 | 6 | 6 | 6 | 24 |" in text and "| AC2 |" in text
    assert "<svg" not in text
    widths = [
        {line.count("|") for line in block.splitlines() if line.startswith("|")}
        for block in text.split("\n\n")
    ]
    assert all(len(counts) <= 1 for counts in widths)
