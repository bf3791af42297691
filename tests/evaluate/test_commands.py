"""The evaluate verb on files, against the same numbers computed by hand."""

import dataclasses
from pathlib import Path

import json_lines
import numpy as np
import pytest

from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Sample
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.evaluate import commands
from llama2rt.evaluate.commands import describe, evaluate
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.rollout.scoring import score


@pytest.fixture(scope="module")
def shape(small_tokenizer):
    return LlamaConfig(
        dim=32,
        layers=1,
        heads=2,
        kv_heads=2,
        ffn_hidden=64,
        vocab_size=small_tokenizer.vocab_size,
        context=128,
    )


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, small_tokenizer, shape):
    model = ScalarModel(shape).initialize(seed=1)
    folder = tmp_path_factory.mktemp("models") / "rm"
    native.save(model, small_tokenizer, folder)
    return model, folder


def _ask(i):
    return [{"role": "user", "content": f"count {i} sheep"}]


def test_accuracy_of_a_comparison_file(tmp_path, reward_model, small_tokenizer):
    model, folder = reward_model
    ratings = ["better", "slightly_better", None]
    records = [
        Comparison(_ask(i), f"{i} quick", f"{i} lazy dogs", rating=ratings[i % 3], safety=None)
        for i in range(12)
    ]
    write(tmp_path / "pairs.jsonl", records)
    result = evaluate(folder, comparisons=(tmp_path / "pairs.jsonl",))
    (file,) = result["comparisons"]
    chosen = score(model, small_tokenizer, [(r.prompt, r.chosen) for r in records])
    rejected = score(model, small_tokenizer, [(r.prompt, r.rejected) for r in records])
    rows = {row["rating"]: row for row in file["accuracy"]}
    assert set(rows) == {"better", "slightly_better", "unrated", "average"}
    assert rows["average"]["mean"] == pytest.approx(np.mean(chosen > rejected))
    assert rows["better"]["mean"] == pytest.approx(np.mean((chosen > rejected)[::3]))
    assert "versions" not in result
    text = describe(result)
    assert "pairs.jsonl" in text and "slightly better" in text and "of 12 pairs" in text


def test_a_pair_judged_both_ways_counts_for_each_kind_apart(tmp_path, reward_model):
    """PKU-SafeRLHF's rows: helpfulness prefers one answer, safety the other."""
    _, folder = reward_model
    rows = [
        {
            "prompt": f"count {i} sheep",
            "response_0": f"{i} quick",
            "response_1": f"{i} lazy dogs",
            "better_response_id": 0,
            "safer_response_id": 1,
        }
        for i in range(12)
    ]
    json_lines.write(tmp_path / "pku.jsonl", rows)
    result = evaluate(folder, comparisons=(tmp_path / "pku.jsonl",))
    helpful, safe = result["comparisons"]
    assert (helpful["kind"], safe["kind"]) == ("helpfulness", "safety")
    means = [file["accuracy"][-1]["mean"] for file in (helpful, safe)]
    assert sum(means) == pytest.approx(1.0)
    assert means[0] != 0.5
    assert "safety pairs ranked as annotated" in describe(result)


def test_a_source_says_what_a_file_of_comparisons_is(tmp_path, reward_model):
    """The same file twice, and neither is lost."""
    _, folder = reward_model
    path = tmp_path / "pairs.jsonl"
    rows = ({"prompt": _ask(i), "chosen": f"{i} fox", "rejected": "dogs"} for i in range(3))
    json_lines.write(path, rows)
    result = evaluate(folder, comparisons=(path, Source(path=path, kind="safety")))
    assert [file["kind"] for file in result["comparisons"]] == ["helpfulness", "safety"]
    with pytest.raises(InputError, match="held_out: means nothing here"):
        evaluate(folder, comparisons=(Source(path=path, held_out=1),))


def test_a_version_in_the_folder_one_stands_in_has_a_name(tmp_path, reward_model, monkeypatch):
    _, folder = reward_model
    samples = tmp_path / "v7" / "samples"
    write(samples / "part-00000.jsonl", [Sample("1", _ask(1), "fox")])
    for here, name in ((tmp_path / "v7", "."), (tmp_path / "v7", "samples"), (samples, ".")):
        monkeypatch.chdir(here)
        (version,) = evaluate(folder, samples=(Path(name),))["versions"]
        assert version["name"] == "v7"


def test_versions_by_sample_files(tmp_path, reward_model, small_tokenizer):
    model, folder = reward_model
    a = [Sample(str(i), _ask(i), f"fox {i} {j}") for i in range(6) for j in range(3)]
    b = [Sample(str(i), _ask(i), f"{i} dogs jump") for i in range(2, 9)]
    write(tmp_path / "sft.jsonl", a)
    write(tmp_path / "v1.jsonl", b)
    result = evaluate(folder, samples=(tmp_path / "sft.jsonl", tmp_path / "v1.jsonl"))

    of_a = score(model, small_tokenizer, [(s.messages, s.response) for s in a]).reshape(6, 3)
    of_b = score(model, small_tokenizer, [(s.messages, s.response) for s in b])
    sft, v1 = result["versions"]
    assert (sft["name"], sft["prompts"], sft["samples"]) == ("sft", 6, 18)
    assert sft["reward"]["mean"] == pytest.approx(of_a.mean(), abs=1e-5)
    assert sft["best_of"]["max"][-1] == pytest.approx(of_a.max(axis=1).mean(), abs=1e-5)
    assert "best_of" not in v1  # one sample a prompt: nothing to choose from
    (pair,) = result["win_rates"]
    expected = np.mean([(of_a[i] > of_b[i - 2]).mean() for i in range(2, 6)])
    assert (pair["a"], pair["b"]) == ("sft", "v1")
    assert pair["mean"] == pytest.approx(expected)
    assert pair["wins"] + pair["ties"] + pair["losses"] == 4  # the prompts both answered
    assert "sft over v1" in describe(result)


def test_bad_input_says_what_to_do(tmp_path, reward_model, small_tokenizer, shape):
    _, folder = reward_model
    with pytest.raises(InputError, match=r"--comparisons or --samples"):
        evaluate(folder)
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for option, expected in (
        ({"micro_tokens": 0}, "^micro_tokens: expected 1 to 2147483647, got 0"),
        ({"micro_tokens": 2**31}, "^micro_tokens: expected 1 to 2147483647, got 2147483648"),
        ({"skip_invalid": -1}, "^skip_invalid: expected at least 0, got -1"),
    ):
        with pytest.raises(InputError, match=expected):
            evaluate(folder, samples=(one,), **option)
    write(one, [Sample("1", _ask(1), "x")])
    write(other, [Sample("2", _ask(1), "x")])
    with pytest.raises(InputError, match="a and b share no prompt_id"):
        evaluate(folder, samples=(one, other))
    llama = tmp_path / "llama"
    native.save(Llama(dataclasses.replace(shape)).initialize(0), small_tokenizer, llama)
    with pytest.raises(InputError, match="expected a reward model"):
        evaluate(llama, samples=(one,))
    bare = tmp_path / "bare"
    native.save(ScalarModel(shape).initialize(0), None, bare)
    with pytest.raises(InputError, match="holds no tokenizer"):
        evaluate(bare, samples=(one,))
    one.write_text('{"prompt_id": "1"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1: "):
        evaluate(folder, samples=(one,))


def test_all_input_is_checked_before_the_weights(tmp_path, reward_model, monkeypatch):
    """What is wrong with the last file is said before the first is scored."""
    _, folder = reward_model
    load = commands.load

    def refuse(path, device="cpu", dtype=None):
        if str(device) != "meta":
            pytest.fail(f"{path}: its weights were loaded before all inputs were checked")
        return load(path, device)

    monkeypatch.setattr(commands, "load", refuse)
    good, other, long = (tmp_path / f"{name}.jsonl" for name in ("good", "other", "long"))
    write(good, [Sample("1", _ask(1), "x")])
    write(other, [Sample("2", _ask(1), "x")])
    write(long, [Sample("1", _ask(1), "x"), Sample("1", _ask(1), "fox and dog " * 99)])
    with pytest.raises(InputError, match=r"long: answer 2 has \d+ tokens .* context is 128"):
        evaluate(folder, samples=(good, long))
    with pytest.raises(InputError, match="good and other share no prompt_id"):
        evaluate(folder, samples=(good, other))
    pair = Comparison(_ask(1), "x", "fox and dog " * 99)
    write(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(InputError, match=r"pairs\.jsonl: answer 2 has \d+ tokens"):
        evaluate(folder, comparisons=(tmp_path / "pairs.jsonl",), samples=(good,))


@pytest.mark.parametrize("micro_tokens", [-1, 0, 3_000_000_000])
def test_micro_tokens_out_of_range_are_named(tmp_path, reward_model, micro_tokens):
    write(tmp_path / "a.jsonl", [Sample("1", _ask(1), "x")])
    with pytest.raises(InputError, match="micro_tokens: expected 1 to 2147483647, got"):
        evaluate(reward_model[1], samples=(tmp_path / "a.jsonl",), micro_tokens=micro_tokens)


def test_a_folder_of_samples_is_one_version(tmp_path, reward_model):
    _, folder = reward_model
    parts = [[Sample(f"{part}-{i}", _ask(i), f"fox {i}") for i in range(3)] for part in range(2)]
    for version in ("v1", "v2"):
        for number, part in enumerate(parts):
            write(tmp_path / version / "samples" / f"part-{number:05d}.jsonl", part)
        # The best of the parts, and other prompts' answers, are no further samples.
        write(tmp_path / version / "samples" / "best.jsonl", parts[0][:1])
        (tmp_path / version / "manifest.json").write_text("{}")
        write(tmp_path / "sharded" / f"{version}.jsonl", parts[version == "v2"])
    samples = (tmp_path / "v1" / "samples", tmp_path / "v2", tmp_path / "sharded")
    result = evaluate(folder, samples=samples)
    found = [(v["name"], v["prompts"], v["samples"]) for v in result["versions"]]
    assert found == [("v1", 6, 6), ("v2", 6, 6), ("sharded", 6, 6)]
    assert len(result["win_rates"]) == 3
    write(tmp_path / "sharded" / "v3.jsonl", parts[0])
    with pytest.raises(InputError, match=r"v1\.jsonl and v3\.jsonl both answer prompt '0-0'"):
        evaluate(folder, samples=(tmp_path / "sharded",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no samples"):
        evaluate(folder, samples=(tmp_path / "empty",))
    (tmp_path / "dpo" / "iteration-1" / "samples").mkdir(parents=True)
    (tmp_path / "dpo" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"inside it: .*iteration-1/samples"):
        evaluate(folder, samples=(tmp_path / "dpo",))


def test_files_of_one_name_are_told_apart(tmp_path, reward_model):
    _, folder = reward_model
    paths = (tmp_path / "v1" / "samples.jsonl", tmp_path / "v2" / "samples.jsonl")
    for path in paths:
        write(path, [Sample("1", _ask(1), "x")])
    result = evaluate(folder, samples=paths)
    assert [version["name"] for version in result["versions"]] == [str(path) for path in paths]
    assert result["win_rates"][0]["ties"] == 1


def test_signature_suits_the_command_line(tmp_path, reward_model):
    import tyro

    _, folder = reward_model
    path = tmp_path / "s.jsonl"
    write(path, [Sample("1", _ask(1), "x")])
    result = tyro.cli(evaluate, args=["--reward-model", str(folder), "--samples", str(path)])
    assert result["versions"][0]["name"] == "s"
