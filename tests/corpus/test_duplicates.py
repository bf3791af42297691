"""Equal and almost equal documents of several chunks, against all pairs compared by hand."""

import itertools
import json

import numpy as np
import pytest

from llama2rt.corpus import duplicates
from llama2rt.corpus.duplicates import ALIKE, EQUAL, KEPT, Comparison, Texts, jaccard, runs
from llama2rt.corpus.words import words_of

LEAST = 0.7


@pytest.fixture(autouse=True)
def _datasketch():
    pytest.importorskip("datasketch", reason="datasketch is not installed (extra data)")


def corpus(seed, count):
    """Texts of which some are copies, and some copies with a few words changed."""
    random = np.random.default_rng(seed)
    texts: list[list[str]] = []
    for index in range(count):
        words = [f"w{i}" for i in random.integers(400, size=random.integers(20, 80))]
        if index > 5 and random.random() < 0.5:
            words = list(texts[random.integers(index)])
            for _ in range(random.integers(4)):
                words[random.integers(len(words))] = "other"
        texts.append(words)
    return [" ".join(words) for words in texts]


def test_texts_without_words_are_not_alike():
    bare, other = runs(words_of("!!! ???")), runs(words_of("+ = -"))
    assert jaccard(bare, other, LEAST) == 0.0


def compared(texts, sizes, tmp_path, monkeypatch, a_file=50):
    monkeypatch.setattr(duplicates, "_A_FILE", a_file)  # many files, as of a large corpus
    monkeypatch.setattr(duplicates, "_LATER", a_file)
    edges = np.cumsum([0, *sizes])
    parts = [texts[a:b] for a, b in itertools.pairwise(edges)]
    for number, part in enumerate(parts):
        lines = [json.dumps({"text": text}).encode() + b"\n" for text in part]
        (tmp_path / f"{number}.jsonl").write_bytes(b"".join(lines))
        offsets = np.cumsum([0, *map(len, lines)])[:-1]
        np.savez(tmp_path / f"{number}.npz", offset=offsets)
    comparison = Comparison(sizes, tmp_path / "comparison")
    digests = [np.array([[hash(text) % 2**63, 0] for text in part], np.uint64) for part in parts]
    comparison.equal(iter(digests))
    keys = [
        duplicates.band_keys([words_of(text) for text in part], LEAST)
        if part
        else np.empty((0, duplicates.bands_of(LEAST)), np.uint64)
        for part in parts
    ]
    names = [[str(tmp_path / f"{n}.{end}") for n in range(len(parts))] for end in ("jsonl", "npz")]
    bands = [[part[:, band] for part in keys] for band in range(duplicates.bands_of(LEAST))]
    comparison.alike(bands, Texts(*names), LEAST)
    assert not list((tmp_path / "comparison").iterdir())
    return comparison


def test_the_same_as_all_pairs_by_hand(tmp_path, monkeypatch):
    texts = corpus(0, 300)
    found = compared(texts, [120, 0, 100, 80], tmp_path, monkeypatch)
    sets = [runs(words_of(text)) for text in texts]
    wrong = 0
    for index, text in enumerate(texts):
        earlier = range(index)
        if text in texts[:index]:
            assert found.fate[index] == EQUAL
        elif any(jaccard(sets[index], sets[i], LEAST) >= LEAST for i in earlier):
            # A key is shared with a probability of 0.995 at the threshold.
            wrong += found.fate[index] != ALIKE
        else:
            assert found.fate[index] == KEPT  # nothing is removed that is not alike
    assert wrong <= 3 and (found.fate == ALIKE).sum() > 30 and (found.fate == EQUAL).sum() > 10
    for fate, examples in found.examples.items():
        for document, earlier, similarity in examples:
            assert found.fate[document] == fate and earlier < document
            assert jaccard(sets[document], sets[earlier], 0.0) == pytest.approx(similarity)


def test_chunks_change_nothing(tmp_path, monkeypatch):
    texts = corpus(1, 120)
    fates = []
    for number, (sizes, a_file) in enumerate((([120], 1000), ([1, 50, 69], 7))):
        folder = tmp_path / str(number)
        folder.mkdir()
        fates.append(compared(texts, sizes, folder, monkeypatch, a_file).fate.tolist())
    assert fates[0] == fates[1]
    assert compared([], [0], tmp_path, monkeypatch).fate.tolist() == []
