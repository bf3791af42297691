"""The evaluate verb on files, against the same numbers computed by hand."""

import dataclasses

import numpy as np
import pytest

from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Sample
from llama2rt.errors import InputError
from llama2rt.evaluate.commands import describe, evaluate
from llama2rt.evaluate.scoring import score
from llama2rt.model import Llama, LlamaConfig, ScalarModel


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
    for option in ({"micro_tokens": 0}, {"skip_invalid": -1}):
        with pytest.raises(InputError, match=f"^{next(iter(option))}: expected at least"):
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
