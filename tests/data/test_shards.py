"""Folders of token shards, and the loader that mixes them."""

import json
import os
import resource
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama2rt.data import shards, tokens
from llama2rt.data.shard_loader import ShardLoader, WeightedShards
from llama2rt.data.shards import Shards
from llama2rt.errors import InputError

CONTEXT = 16
WEIGHTS = {"foxes": 3.0, "sheep": 1.0}


def folder_of(path, tokenizer, texts, a_shard):
    files = []
    for index, at in enumerate(range(0, len(texts), a_shard)):
        files.append(path / f"{index:05}.tokens")
        tokens.build(texts[at : at + a_shard], tokenizer, files[-1])
    return shards.write_manifest(path, files, tokenizer)


@pytest.fixture(scope="module")
def sources(small_tokenizer, tmp_path_factory):
    """Two sources, of 9 shards and of 4."""
    root = tmp_path_factory.mktemp("sources")
    foxes = [f"{i} the {'lazy fox ' * (i % 7)}jumps" for i in range(90)]
    sheep = [f"counts {i} sheep" + " from zero to twelve" * (i % 3) for i in range(40)]
    return {
        "foxes": folder_of(root / "foxes", small_tokenizer, foxes, 10),
        "sheep": folder_of(root / "sheep", small_tokenizer, sheep, 10),
    }


def make(sources, weights=None, seed=3, epochs=None, share=(0, 1), batch_tokens=112):
    mix = [
        WeightedShards(name, one, None if weights is None else weights[name])
        for name, one in sources.items()
    ]
    return ShardLoader(mix, CONTEXT, batch_tokens, 32, seed, epochs, share=share)


def windows(step):
    """(source, tokens, targets) of each document of a step, fillers left out."""
    found = []
    for micro in step:
        if micro.weight:
            for begin, end in zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True):
                part = slice(int(begin), int(end))
                assert len(set(micro.sources[part].tolist())) == 1
                found.append(
                    (
                        int(micro.sources[begin]),
                        micro.tokens[part].tolist(),
                        micro.targets[part].tolist(),
                    )
                )
    return found


def test_an_epoch_without_weights_predicts_every_token_once(sources, small_tokenizer):
    for epochs in (1, 2):
        targets = torch.cat([m.targets for step in make(sources, epochs=epochs) for m in step])
        ids = [
            i
            for one in sources.values()
            for number in range(len(one.shards))
            for i in one.stream(number).ids().tolist()
            if i != small_tokenizer.bos
        ]
        expected = {i: n * epochs for i, n in Counter(ids).items()}
        assert Counter(targets[targets >= 0].tolist()) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_one_sequence(sources, ranks):
    whole = make(sources, WEIGHTS, epochs=2)
    parts = [make(sources, WEIGHTS, epochs=2, share=(rank, ranks)) for rank in range(ranks)]
    for step in whole:
        divided = [part.next() for part in parts]
        assert len({len(one) for one in divided}) == 1
        assert sorted(map(str, windows(step))) == sorted(
            str(window) for one in divided for window in windows(one)
        )


def test_goes_on_from_any_step_on_any_number_of_ranks(sources):
    whole, states, steps = make(sources, WEIGHTS, epochs=3), [], []
    while True:
        states.append(json.loads(json.dumps(whole.state_dict())))
        try:
            steps.append(windows(whole.next()))
        except StopIteration:
            break
    assert len(steps) == 3 * whole.steps_per_epoch
    for at in range(0, len(states), 5):
        parts = [make(sources, WEIGHTS, epochs=3, share=(rank, 3)) for rank in range(3)]
        for part in parts:
            part.load_state_dict(states[at])
        for expected in steps[at : at + 2]:
            together = [w for part in parts for w in windows(part.next())]
            assert sorted(map(str, together)) == sorted(map(str, expected))
    with pytest.raises(InputError, match="cannot resume: draws was"):
        make(sources, {"foxes": 1.0, "sheep": 1.0}).load_state_dict(states[1])


def test_a_mix_has_the_shares_that_it_was_asked_for(sources):
    """In tokens, over an epoch of windows of which the last of each shard is short; and each source
    is gone through whole before any of it comes again."""
    loader = make(sources, WEIGHTS, batch_tokens=CONTEXT)
    epochs = 40
    rows = np.concatenate([loader.rows(e, 0, loader._size) for e in range(epochs)])
    read = np.bincount(rows[:, 0], weights=rows[:, 3])
    np.testing.assert_allclose(read / read.sum(), [0.75, 0.25], atol=0.001)
    for index, one in enumerate(sources.values()):
        covered = [np.zeros(length - 1, int) for length in one.lengths]
        for _, shard, first, length in rows[rows[:, 0] == index].tolist():
            covered[shard][np.arange(first, first + length) % len(covered[shard])] += 1
        counts = np.concatenate(covered)
        assert counts.max() - counts.min() <= 1
        assert counts.mean() == pytest.approx(loader.passes(epochs * loader._size)[index], rel=0.01)


def test_seeds_and_epochs_differ(sources):
    first = make(sources).rows(0, 0, 40)
    assert not (first == make(sources).rows(1, 0, 40)).all()
    assert not (first == make(sources, seed=4).rows(0, 0, 40)).all()
    assert (first[10:20] == make(sources).rows(0, 10, 20)).all()


def test_impossible_mixes(sources):
    with pytest.raises(InputError, match="sheep: a weight of 1e-09 is not one of an epoch's"):
        make(sources, {"foxes": 1.0, "sheep": 1e-9})
    with pytest.raises(InputError, match="must both hold at least one window"):
        make(sources, batch_tokens=8)


def test_a_changed_shard_is_refused_by_name(small_tokenizer, tmp_path):
    made = folder_of(tmp_path, small_tokenizer, ["one fox", "two dogs", "sheep"], 1)
    known = made.verify({})
    assert made.verify(known) == known
    path = tmp_path / "00001.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for seen in ({}, known):
        with pytest.raises(InputError, match=r"00001\.tokens: has changed since"):
            Shards(tmp_path).verify(seen)
    # What has kept its size and time is not read again: terabytes would take hours.
    path.write_bytes(content)
    moved = Shards(tmp_path).verify(known)
    assert moved.keys() == known.keys() and moved != known
    path.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"00001\.tokens: damaged: \d+ bytes, expected"):
        Shards(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"00001\.tokens: cannot be opened \(No such file"):
        Shards(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "llama2rt-shards-1"}')
    with pytest.raises(InputError, match="not a manifest of token shards"):
        Shards(tmp_path)
    with pytest.raises(InputError, match=r"absent/manifest\.json: cannot be opened"):
        Shards(tmp_path / "absent")


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_the_end_is_held_out_in_whole_documents(sources, small_tokenizer, fraction):
    one = sources["foxes"]
    training, held_out = one.hold_out(fraction, small_tokenizer)
    ids = [i for n in range(len(one.lengths)) for i in one.stream(n).ids().tolist()]
    kept = [i for n in range(len(training.lengths)) for i in training.stream(n).ids().tolist()]
    rest = [i for stream in held_out.streams for i in stream.ids().tolist()]
    assert kept + rest == ids and rest[0] == small_tokenizer.bos
    assert abs(len(rest) - fraction * len(ids)) < 40  # a document
    starts = [n for n, i in enumerate(rest) if i == small_tokenizer.bos]
    texts = [
        small_tokenizer.decode(rest[a + 1 : b - 1])
        for a, b in zip(starts, [*starts[1:], len(rest)], strict=True)
    ]
    assert held_out.text_bytes == sum(len(text.encode()) for text in texts)
    predicted = sum(batch.weight for batch in held_out.batches(16, 64))
    assert predicted == sum(i != small_tokenizer.bos for i in rest)


def test_one_document_is_not_cut(small_tokenizer, tmp_path):
    made = folder_of(tmp_path, small_tokenizer, ["one fox jumps over"], 1)
    assert made.hold_out(0.5, small_tokenizer) is None


@pytest.fixture
def few_files():
    """A process that may open 16 files more than are mapped at a time."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = len(os.listdir("/proc/self/fd")) + shards._OPEN + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    yield shards._OPEN + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_step_and_a_held_out_end_may_have_more_shards_than_files_can_be_open(
    few_files, small_tokenizer, tmp_path
):
    """Of two sources together: each alone has fewer than that."""
    count = few_files // 2 + 20
    tokens.build(["the fox jumps"], small_tokenizer, tmp_path / "one")
    content = (tmp_path / "one").read_bytes()
    made = {}
    for name in ("foxes", "sheep"):
        row = None
        for index in range(count):
            path = tmp_path / name / f"{index:05}.tokens"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            row = row or shards.Shard.of(path)
        rows = [replace(row, file=f"{index:05}.tokens") for index in range(count)]
        made[name] = shards.write_manifest(tmp_path / name, rows, small_tokenizer)
    # A window is a shard.
    step = make(made, batch_tokens=2 * count * CONTEXT).next()
    _, *ids, _ = tokens.TokenFile(tmp_path / "one").ids().tolist()
    assert sum(len(micro.cu_seqlens) - 1 for micro in step) >= 2 * count
    assert sum(micro.weight for micro in step) == 2 * count * (len(ids) + 1)
    ends = [one.hold_out(0.99, small_tokenizer)[1] for one in made.values()]
    predicted = sum(batch.weight for end in ends for batch in end.batches(16, 64))
    assert predicted == sum(len(end.streams) for end in ends) * (len(ids) + 1)
