"""Near-duplicates against all pairs compared by hand, and what a signature alone would take."""

import sys

import numpy as np
import pytest

from llama2rt.data import near_duplicates
from llama2rt.data.near_duplicates import earlier_alike, runs
from llama2rt.errors import InputError


@pytest.fixture(autouse=True)
def _datasketch(request):
    if "missing" not in request.node.name:
        pytest.importorskip("datasketch", reason="datasketch is not installed (extra data)")


def jaccard(one, other):
    return min(
        len(runs(a) & runs(b)) / len(runs(a) | runs(b)) for a, b in zip(one, other, strict=True)
    )


def by_hand(texts, least):
    """The same as `earlier_alike`, every text against every one that is kept."""
    kept, found = [], {}
    for index, text in enumerate(texts):
        alike = [k for k in kept if jaccard(texts[k], text) >= least]
        if alike:
            found[index] = alike[0]
        else:
            kept.append(index)
    return found


def test_every_pair_at_and_above_the_threshold_and_no_other():
    """240 records of three parts, copies of each other with up to 6 words changed."""
    random = np.random.default_rng(0)
    names = np.array([f"w{i}" for i in range(400)])
    texts = []
    for _ in range(60):
        parts = [names[random.integers(400, size=n)] for n in (10, 60, 90)]
        for _ in range(4):
            copy = [part.copy() for part in parts]
            for part in copy[1:]:
                where = random.permutation(len(part))[: random.integers(4)]
                part[where] = names[random.integers(400, size=len(where))]
            texts.append(tuple(" ".join(part) for part in copy))
    for least in (0.7, 0.8, 0.9):
        found = {index: earlier for index, earlier, _ in earlier_alike(texts, least)}
        expected = by_hand(texts, least)
        assert 5 < len(expected) < 180
        assert found == expected
    similar = {index: similarity for index, _, similarity in earlier_alike(texts, 0.8)}
    assert all(
        similar[i] == pytest.approx(jaccard(texts[i], texts[e]))
        for i, e in by_hand(texts, 0.8).items()
    )
    assert list(earlier_alike(texts, 0.8)) == list(earlier_alike(texts, 0.8))


def test_every_part_counts_alone():
    """A long common question, or a common context, makes no two comparisons the same."""
    long = " ".join(f"q{i}" for i in range(500))
    answers = [" ".join(f"{name}{i}" for i in range(20)) for name in "abc"]
    texts = [("", long, answers[0], answers[1]), ("", long, answers[0], answers[2])]
    assert list(earlier_alike(texts, 0.8)) == []
    others = [(long, "go on", *answers[:2]), (long.replace("q", "r"), "go on", *answers[:2])]
    assert list(earlier_alike(others, 0.8)) == []
    assert [(i, e) for i, e, _ in earlier_alike([*others, others[1]], 0.8)] == [(2, 1)]


def test_short_texts_and_scripts_without_spaces():
    assert runs("Yes!") == {"yes"} and runs("...") == {"..."} and runs("") == {""}
    assert runs("One, two THREE four") == {"one two three", "two three four"}
    assert runs("今日は晴れ") == {"今 日 は", "日 は 晴", "は 晴 れ"}
    assert list(earlier_alike([("yes",), ("no",), ("Yes.",)], 0.5)) == [(2, 0, 1.0)]
    assert list(earlier_alike([], 0.5)) == []


def test_bands_propose_what_they_promise():
    for least in (0.3, 0.5, 0.8, 0.95):
        rows = near_duplicates.rows_a_band(least)
        bands = 128 // rows
        assert 1 - (1 - least**rows) ** bands >= 0.995
        assert 1 - (1 - least ** (rows + 1)) ** (128 // (rows + 1)) < 0.995


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(InputError, match=r"near_duplicates: needs datasketch: pip install"):
        list(earlier_alike([("a",)], 0.8))
