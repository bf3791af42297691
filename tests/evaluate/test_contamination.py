"""Overlap of evaluation samples with training texts, against spans planted by hand and a search
that tries everything; the paper's own significance figures."""

import json

import json_lines
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt import cli
from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue, Document
from llama2rt.evaluate.contamination.effect import affected, subsets, table, z_statistic
from llama2rt.evaluate.contamination.overlap import SEED, Overlap


def everything(samples, texts, length, skips):
    """Shares by definition: every pair of positions, extended token by token."""
    shares = []
    for sample in samples:
        covered = set()
        for text in texts:
            for i in range(len(sample)):
                for j in range(len(text)):
                    n, differing, last = 0, 0, 0
                    while i + n < len(sample) and j + n < len(text):
                        if sample[i + n] == text[j + n]:
                            last = n + 1
                        else:
                            differing += 1
                            if n < SEED or differing > skips:
                                break
                        n += 1
                    if last >= max(length, SEED):
                        covered |= set(range(i, i + last))
        shares.append(len(covered) / max(1, len(sample)))
    return shares


def test_planted_spans():
    sample = np.arange(100, 150)
    other = np.arange(1000, 1100)

    def shares(text, length=10, skips=4):
        overlap = Overlap([sample, []], skips)
        overlap.add(other)
        overlap.add(text)
        return overlap.shares(length).tolist()

    inside = np.concatenate([other[:30], sample[5:30], other[30:]])
    assert shares(inside) == [0.5, 0]
    assert shares(inside, length=25) == [0.5, 0] and shares(inside, length=26) == [0, 0]
    assert shares(sample[:9]) == [0, 0] and shares(sample[:10]) == [0.2, 0]
    # Differences after the tenth token: four are allowed, and the span ends with an equal token.
    changed = sample.copy()
    changed[[12, 20, 25, 30]] = 0
    assert shares(changed) == [1, 0]
    assert shares(changed, skips=3) == [(30 + 19) / 50, 0]  # and the rest by a span of its own
    changed[49] = 0
    assert shares(changed) == [(31 + 18) / 50, 0]  # the fifth ends the span before it
    # One among the first ten: no span begins there.
    early = np.concatenate([sample[:5], [0], sample[6:20], other])
    assert shares(early) == [14 / 50, 0]


@settings(max_examples=40)
@given(st.data())
def test_equals_a_search_of_everything(data):
    tokens = st.lists(st.integers(0, 1), max_size=40)
    samples = data.draw(st.lists(tokens, min_size=1, max_size=3))
    texts = data.draw(st.lists(tokens, min_size=1, max_size=3))
    skips, length = data.draw(st.integers(0, 2)), data.draw(st.integers(10, 14))
    overlap = Overlap([np.array(s) for s in samples], skips)
    for text in texts:
        overlap.add(text)
    np.testing.assert_allclose(overlap.shares(length), everything(samples, texts, length, skips))


def test_the_papers_significance():
    """Table 51, HellaSwag at L = 40 of the 70B model: samples, mean, mean of all, Z. Its means are
    rounded to a tenth of a per cent."""
    rows = [(7391, 80.0, 82.5, -5.73), (2651, 89.5, 82.4, 9.56), (9194, 81.6, 82.5, -2.27),
            (848, 92.2, 82.5, 7.42)]  # fmt: skip
    for samples, mean, of_all, z in rows:
        deviation = np.sqrt(of_all / 100 * (1 - of_all / 100))
        found = z_statistic(mean / 100, of_all / 100, deviation, samples)
        assert found == pytest.approx(z, abs=0.1 * np.sqrt(samples) / 100 / deviation)


def test_subsets_and_their_verdict():
    shares = np.repeat([0.0, 0.1999, 0.2, 0.5, 0.8, 1.0], 40)
    scores = np.tile([0.0, 1.0, 0.0, 0.0], 60).astype(float)
    found = subsets(shares, scores)
    assert [found[n]["samples"] for n in ("clean", "not_clean", "not_dirty", "dirty")] == [
        80, 160, 160, 80]  # fmt: skip
    assert affected(found) is False and affected(subsets(shares)) is None
    better = np.where(shares >= 0.8, 1.0, np.where(shares < 0.2, 0.0, scores))
    assert affected(subsets(shares, better)) is True
    assert affected(subsets(shares, 1 - better)) is False  # a significant harm is no benefit
    assert table({10: shares, 20: shares * 0}, better)["affected_at"] == 10
    assert subsets([0.0, 0.0], [1.0, 1.0])["dirty"]["samples"] == 0


def test_the_command(tmp_path, small_tokenizer, capsys):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "counts", "sheep"]
    texts = [" ".join(np.random.default_rng(i).permutation(words * 2)) for i in range(4)]
    tokenizer = tmp_path / "tokenizer.model"
    small_tokenizer.save(tmp_path)
    logged = [
        {
            "doc_id": i, "doc": {"question": text, "choices": {"text": []}}, "doc_hash": "x",
            "filter": name, "metrics": ["acc"], "acc": float(i > 1),
        }
        for i, text in enumerate(texts)
        for name in ("strict", "flexible")
    ]  # fmt: skip
    json_lines.write(tmp_path / "samples_task.jsonl", logged)
    write(tmp_path / "documents.jsonl", [Document("nothing alike here"), Document(texts[3])])
    turns = [{"role": "user", "content": texts[2]}, {"role": "assistant", "content": "yes"}]
    write(tmp_path / "dialogues.jsonl", [Dialogue(turns)])

    def run(*options):
        try:
            cli.main(["contamination", "--tokenizer", str(tokenizer), *options])
        except SystemExit as end:
            return end.code
        return 0

    files = ("--evaluation", str(tmp_path / "samples_task.jsonl"))
    training = ("--training", str(tmp_path / "documents.jsonl"))
    out = tmp_path / "result.json"
    assert run(*files, *training, "--json", "--out", str(out)) == 0
    (row,) = json.loads(capsys.readouterr().out)["evaluation"]
    assert row["samples"] == 4 and row["score"] == "acc" and "shares" not in row
    assert json.loads(out.read_text())["evaluation"][0]["shares"]["10"] == [0, 0, 0, 1]
    dialogues = ("--training", str(tmp_path / "dialogues.jsonl"), "--as", "dialogue")
    assert run(*files, *dialogues, "--text", "question") == 0
    text = capsys.readouterr().out
    assert "25.0 % of a sample" in text and "no sign that it was raised" in text

    # Numbers are text, a list is no score, and what holds neither is named.
    json_lines.write(tmp_path / "listed.jsonl", [
        {**logged[0], "metrics": ["words"], "words": [-1.0, 12], "doc": {"q": 7}}
    ])  # fmt: skip
    listed = ("--evaluation", str(tmp_path / "listed.jsonl"))
    assert run(*listed, *training, "--text", "q", "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluation"][0]["samples"] == 1
    json_lines.write(tmp_path / "bare.jsonl", [7])
    bare = ("--evaluation", str(tmp_path / "bare.jsonl"))

    json_lines.write(tmp_path / "other.jsonl", [{"text": "a"}])
    other = ("--evaluation", str(tmp_path / "other.jsonl"))
    for wrong, message in (
        ((*bare, *training), "bare.jsonl:1: expected a JSON object"),
        ((*files, *training, "--text", "choices"), "samples_task.jsonl:1: choices: holds no text"),
        ((*other, *training), "other.jsonl:1: no logged sample"),
        ((*other, *training, "--text", "txt"), "other.jsonl:1: no key 'txt'"),
        ((*files, *training, "--score", "f1"), "samples_task.jsonl:1: f1: expected a number"),
        ((*files, *training, "--lengths", "9"), "lengths: expected at least 10"),
        ((*files, "--training", "absent.jsonl"), "absent.jsonl: no such file"),
    ):
        assert run(*wrong) == 2
        assert message in capsys.readouterr().err
