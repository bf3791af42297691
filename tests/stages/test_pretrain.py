"""Pretraining: text to tokenizer to model, held-out bits per byte, a resumed run."""

import json
import math

import json_lines
import pytest
import torch
from pydantic import ValidationError
from small_models import packed

import llama2rt
from llama2rt.data.tokens import TokenFile
from llama2rt.errors import InputError
from llama2rt.stages import corpus, pretrain
from llama2rt.stages.pretrain import PretrainRecipe
from llama2rt.stages.shape import ModelShape
from llama2rt.train import TrainOptions

TEXT = "".join(
    f"{a} has {i} {b}s and gives {i // 2} of the {b}s away, so {a} keeps {i - i // 2}.\n"
    for i in range(12)
    for a in ("Ann", "Bob", "Cleo", "Dan")
    for b in ("pear", "ball", "coin")
)


def recipe(tmp_path, **changes) -> PretrainRecipe:
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    fields = {
        "data": [data],
        "held_out": 0.1,
        "vocab_size": 340,
        "context": 32,
        "batch_tokens": 512,
        "epochs": 4,
        "model": ModelShape(dim=32, layers=1, heads=2, context=48),
        "train": TrainOptions(lr=1e-2, micro_tokens=256, validate_every=10),
    }
    return PretrainRecipe(**{**fields, **changes})


def held_out(directory) -> list[float]:
    lines = json_lines.read(directory / "metrics.jsonl")
    return [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]


def test_text_to_model(tmp_path):
    folder = pretrain.run(recipe(tmp_path), tmp_path / "run")
    losses = held_out(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]
    model, tokenizer = llama2rt.load(folder)
    assert tokenizer.vocab_size == model.config.vocab_size == 340
    assert (model.config.ffn_hidden, model.config.context) == (96, 48)
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]
    assert summary["bits_per_byte"] == losses[-1]

    # The tokenizer and the training stream saw nothing of the last tenth.
    stream = TokenFile(tmp_path / "run" / "tokens" / "held_out.bin")
    assert stream.text_bytes == pytest.approx(0.1 * len(TEXT), abs=100)
    training = TokenFile(tmp_path / "run" / "tokens" / "training.bin")
    assert training.text_bytes + stream.text_bytes == len(TEXT)

    # Bits per byte by its definition: the probability of the whole text, one window at a time.
    ids = torch.tensor(stream.ids().astype("int64"))
    nats = 0.0
    for begin in range(0, len(ids) - 1, 32):
        window = ids[begin : begin + 33]
        with torch.no_grad():
            logits = model.logits(*packed(window[:-1]))
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert nats / math.log(2) / stream.text_bytes == pytest.approx(losses[-1], rel=1e-5)


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    whole = pretrain.run(recipe(tmp_path), tmp_path / "whole")
    options = TrainOptions(lr=1e-2, micro_tokens=256, validate_every=10, checkpoint_every=4)
    changed = recipe(tmp_path, train=options)
    original, calls = pretrain.next_token, []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 17:
            raise RuntimeError("power cut")
        return original(model, batch)

    monkeypatch.setattr(pretrain, "next_token", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain.run(changed, tmp_path / "parts")
    monkeypatch.undo()
    parts = pretrain.run(changed, tmp_path / "parts", resume=True)
    name = "model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert held_out(tmp_path / "parts") == held_out(tmp_path / "whole")
    # A complete run is left as it is.
    before = (parts / name).stat().st_mtime_ns
    assert pretrain.run(changed, tmp_path / "parts", resume=True) == parts
    assert (parts / name).stat().st_mtime_ns == before


def test_continues_from_a_model_folder(tmp_path):
    first = pretrain.run(recipe(tmp_path), tmp_path / "first")
    again = {"init": first, "vocab_size": None, "model": ModelShape(), "epochs": 1}
    pretrain.run(recipe(tmp_path, **again), tmp_path / "second")
    assert held_out(tmp_path / "second")[-1] < 1.02 * held_out(tmp_path / "first")[-1]
    with pytest.raises(InputError, match="context: 64 exceeds the model's 48"):
        pretrain.run(recipe(tmp_path, **again, context=64), tmp_path / "third")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "exactly one of steps and epochs"),
        ({"vocab_size": None}, "exactly one of tokenizer and vocab_size"),
        ({"init": "x"}, "init brings its model"),
        ({"held_out": 1.0}, "less than 1"),
        ({"model": {"dims": 3}}, "dims"),
        ({"epochs": float("inf")}, "finite"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"batch_tokens": 8}, "batch_tokens: 8 cannot hold one window of context"),
        ({"train": {"micro_tokens": 8}}, "train.micro_tokens: 8 cannot hold one window"),
    ],
)
def test_impossible_recipes(tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ModelShape(preset="llama9"), "model: preset: expected one of"),
        (ModelShape(dim=30, layers=1, heads=4), "model: heads"),
        (ModelShape(dim=32), "model: give preset, or layers, heads too"),
    ],
)
def test_impossible_shapes_name_the_key(shape, message):
    with pytest.raises(InputError, match=message):
        shape.config(512, 64)


def test_a_preset_with_changes():
    config = ModelShape(preset="llama2-70b", layers=2).config(32000, 4096)
    assert (config.layers, config.kv_heads, config.ffn_hidden) == (2, 8, 28672)


@pytest.mark.parametrize("name", ["tinyshakespeare"])
def test_shipped_recipes_are_valid(name):
    from llama2rt.cli import find_recipe, read_recipe

    PretrainRecipe.model_validate(read_recipe(find_recipe(name)))


def test_an_impossible_shape_is_said_before_anything_is_written(tmp_path):
    wrong = recipe(tmp_path, model={"dim": 32, "layers": 1, "heads": 3})
    with pytest.raises(InputError, match="model: heads: expected a divisor of dim 32, got 3"):
        pretrain.run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_sources_end_is_held_out_and_measured(tmp_path, caplog):
    """Two files, one of which names two sources in turn: three ends, each with its figure."""
    words = {"a": "pear plum fig", "b": "iron zinc tin", "c": "oak elm ash"}
    lines = {
        name: "".join(f"{i} {text} {i % 7} {text[::-1]}.\n" for i in range(300))
        for name, text in words.items()
    }
    (tmp_path / "a.txt").write_text(lines["a"])
    pieces = {name: lines[name].splitlines(keepends=True) for name in "bc"}
    documents = [
        {"text": "".join(pieces[name][i : i + 30]), "source": name}
        for i in range(0, 300, 30)
        for name in "bc"
    ]
    json_lines.write(tmp_path / "two.jsonl", [*documents, {"text": "x", "source": "tiny"}])
    changes = {"data": [tmp_path / "a.txt", tmp_path / "two.jsonl"], "epochs": 2}
    pretrain.run(recipe(tmp_path, **changes), tmp_path / "run")
    assert "two.jsonl: tiny: nothing held out" in caplog.text
    names = json.loads((tmp_path / "run" / "tokens" / "held_out.json").read_text())
    assert list(names) == ["a.txt", "two.jsonl: b", "two.jsonl: c"]

    last = [m for m in json_lines.read(tmp_path / "run" / "metrics.jsonl") if "bits_per_byte" in m]
    each = {name: last[-1][f"bits_per_byte/{name}"] for name in names}
    model, tokenizer = llama2rt.load(tmp_path / "run" / "model")
    sizes = {}
    for (name, file), label in zip(names.items(), "abc", strict=True):
        stream = TokenFile(tmp_path / "run" / "tokens" / file)
        sizes[name] = stream.text_bytes
        assert stream.text_bytes == pytest.approx(0.1 * len(lines[label]), abs=60)
        text = tokenizer.decode([int(i) for i in stream.ids() if i > 2])
        assert lines[label].endswith(text.strip()[-200:] + "\n")
        alone = pretrain.held_out_losses(model, {name: stream}, 32, 256)
        assert alone["bits_per_byte"] == pytest.approx(each[name], rel=1e-5)
    total = sum(each[name] * sizes[name] for name in names) / sum(sizes.values())
    assert last[-1]["bits_per_byte"] == pytest.approx(total, rel=1e-6)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bits_per_byte/a.txt"] == each["a.txt"]


def test_sources_that_are_pages_count_as_one(tmp_path):
    path = tmp_path / "pages.jsonl"
    json_lines.write(path, [{"text": TEXT, "source": f"http://{i}"} for i in range(65)])
    assert list(corpus.by_source(recipe(tmp_path, data=[path]))) == ["pages.jsonl"]


def test_files_of_one_name_are_two_sources(tmp_path):
    data = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        data.append(tmp_path / folder / "text.txt")
        data[-1].write_text(TEXT)
    assert list(corpus.by_source(recipe(tmp_path, data=data))) == [str(path) for path in data]
