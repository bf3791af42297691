"""Pretraining on a mix: shards and text by weight, held out and measured by source, on any number
of processes, refused where it cannot be had or where a shard has changed."""

import json

import json_lines
import pytest
from pydantic import ValidationError

from llama2rt.data import shards, tokens
from llama2rt.errors import InputError
from llama2rt.parallel import ParallelOptions
from llama2rt.stages import pretrain
from llama2rt.stages.pretrain import PretrainRecipe
from llama2rt.stages.shape import ModelShape
from llama2rt.train import TrainOptions


@pytest.fixture(scope="module")
def world(small_tokenizer, tmp_path_factory):
    """A folder of three shards, a text file, and a tokenizer."""
    root = tmp_path_factory.mktemp("mix")
    small_tokenizer.save(root / "tokenizer")
    texts = [f"{i} the {'lazy fox ' * (i % 7)}jumps over {i}" for i in range(120)]
    files = []
    for index in range(3):
        files.append(root / "foxes" / f"{index}.tokens")
        tokens.build(texts[index::3], small_tokenizer, files[-1])
    shards.write_manifest(root / "foxes", files, small_tokenizer)
    (root / "sheep.txt").write_text("".join(f"sheep {i} counts to twelve\n" for i in range(60)))
    return root


def recipe(world, **changes) -> PretrainRecipe:
    fields = {
        "sources": [
            {"path": world / "foxes", "weight": 2.0},
            {"path": world / "sheep.txt", "weight": 1.0},
        ],
        "tokenizer": world / "tokenizer",
        "held_out": 0.1,
        "context": 32,
        "batch_tokens": 256,
        "steps": 24,
        "model": ModelShape(dim=32, layers=1, heads=2, context=32),
        "train": TrainOptions(
            lr=1e-2, micro_tokens=128, validate_every=12, log_every=1, checkpoint_every=10
        ),
    }
    return PretrainRecipe(**{**fields, **changes})


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "run"
    pretrain.run(recipe(world), directory)
    return directory


def test_each_source_has_its_share_its_loss_and_its_held_out_end(trained):
    rows = json_lines.read(trained / "metrics.jsonl")
    steps = [row for row in rows if "loss/foxes" in row]
    assert len(steps) == 24
    for row in steps:
        assert row["share/foxes"] + row["share/sheep"] == pytest.approx(1)
        mean = sum(row[f"share/{n}"] * row.get(f"loss/{n}", 0) for n in ("foxes", "sheep"))
        assert mean == pytest.approx(row["loss"], rel=1e-5)
        # A step without any window of a source has no loss to say.
        assert ("loss/sheep" in row) == (row["share/sheep"] > 0)
    of_sheep = [row["loss/sheep"] for row in steps if "loss/sheep" in row]
    assert len(of_sheep) > 12 and of_sheep[-1] < 0.7 * of_sheep[0]
    assert sum(row["share/foxes"] for row in steps) / 24 == pytest.approx(2 / 3, abs=0.05)
    last = [row for row in rows if "bits_per_byte" in row][-1]
    assert {"bits_per_byte/foxes", "bits_per_byte/sheep"} <= last.keys()
    manifest = json.loads((trained / "manifest.json").read_text())
    assert [row["name"] for row in manifest["mixture"]] == ["foxes", "sheep"]
    assert manifest["mixture"][0]["share_of_windows"] == pytest.approx(2 / 3, abs=0.02)
    assert manifest["inputs"]["sources.0"]["path"].endswith("manifest.json")


def test_two_processes_take_the_steps_of_one(world, trained, tmp_path, on_ranks):
    run = tmp_path / "two"
    on_ranks(2, pretrain.run, recipe(world, parallel=ParallelOptions(data=2)), run)
    rows = [json_lines.read(folder / "metrics.jsonl") for folder in (trained, run)]
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "loss/foxes", "loss/sheep", "share/foxes", "bits_per_byte/sheep"):
            assert (key in one) == (key in two)
            assert key not in one or two[key] == pytest.approx(one[key], rel=1e-4)


def test_resumes_to_the_same_bits_but_not_on_a_changed_shard(world, trained, tmp_path, monkeypatch):
    original, calls = pretrain.text_sources.next_token_of, []

    def failing(names):
        objective = original(names)

        def limited(model, batch):
            calls.append(1)
            if len(calls) == 32:  # in step 16, behind the checkpoint of step 10
                raise RuntimeError("power cut")
            return objective(model, batch)

        return limited

    monkeypatch.setattr(pretrain.text_sources, "next_token_of", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain.run(recipe(world), tmp_path / "run")
    monkeypatch.undo()
    path = world / "foxes" / "1.tokens"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=r"foxes/1\.tokens: has changed since manifest\.json"):
            pretrain.run(recipe(world), tmp_path / "run", resume=True)
    finally:
        path.write_bytes(content)
    pretrain.run(recipe(world), tmp_path / "run", resume=True)
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


def test_more_repeats_than_allowed_are_refused_before_training(world, tmp_path):
    sources = [
        {"path": world / "foxes", "weight": 1.0},
        {"path": world / "sheep.txt", "weight": 9.0, "most_repeats": 2},
    ]
    with pytest.raises(InputError, match=r"sources\.1\.most_repeats: .*sheep\.txt: 24 steps go"):
        pretrain.run(recipe(world, sources=sources), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["x.txt"]}, "give data, or sources in its place"),
        ({"sources": []}, "give data, or sources in its place"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "1 of 2 give a weight"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"path": "a", "share": 0.5}]}, "share"),
    ],
)
def test_impossible_mixes_are_refused(world, changes, message):
    with pytest.raises(ValidationError, match=message):
        recipe(world, **changes)


def test_shards_want_their_own_tokenizer(world, tmp_path):
    with pytest.raises(ValidationError, match="foxes holds tokens already"):
        recipe(world, tokenizer=None, vocab_size=300)
    from llama2rt.text import Tokenizer

    Tokenizer.train(["other words make another tokenizer"], 290, tmp_path / "other")
    with pytest.raises(InputError, match=r"sources\.0: .*made with another tokenizer"):
        pretrain.run(recipe(world, tokenizer=tmp_path / "other"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"sources\.0: .*absent: no such file"):
        pretrain.open_inputs(recipe(world, sources=[{"path": tmp_path / "absent"}]))
    with pytest.raises(InputError, match=r"kind: means nothing to a file of documents"):
        sources = [{"path": world / "sheep.txt", "kind": "safety"}]
        pretrain.open_inputs(recipe(world, sources=sources))
