"""Checkpoints: complete or invisible, damaged ones refused by name, nothing lost on a full disk."""

import os
import shutil

import pytest
import torch
from processes import run_python

from llama2rt.checkpoint import store
from llama2rt.checkpoint.store import CheckpointError, Store

STATE = {"loader": {"epoch": 1}, "loss": 0.1 + 0.2, "nested": [1, 2.5, None]}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(33, 7, generator=generator),
        "half": torch.randn(5, 64, generator=generator).bfloat16().t(),
        "count": torch.tensor(seed),
        "empty": torch.zeros(0, 3),
    }


def assert_is(found, step: int) -> None:
    assert found is not None
    assert found[0] == step
    assert found[2] == STATE
    expected = tensors(step)
    assert found[1].keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[1][name].dtype == tensor.dtype
        assert torch.equal(found[1][name], tensor), name


def saved(folder, *steps: int) -> Store:
    kept = Store(folder)
    for step in steps:
        kept.save(step, tensors(step), STATE)
    return kept


def test_round_trip_keeps_bits_dtypes_and_state(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1000)
    kept = saved(tmp_path / "checkpoints", 3)
    assert len(list(kept.path(3).glob("*.safetensors"))) == 2
    assert_is(kept.latest(), 3)


def test_nothing_yet(tmp_path):
    assert Store(tmp_path / "absent").latest() is None
    assert Store(tmp_path / "absent").steps() == []


def test_keeps_the_newest_and_forgets_an_abandoned_future(tmp_path):
    kept = saved(tmp_path, 1, 2, 3)
    assert kept.steps() == [2, 3]
    kept.save(1, tensors(1), STATE)
    assert kept.steps() == [1]


def test_the_same_step_can_be_saved_again(tmp_path):
    kept = saved(tmp_path, 4, 4)
    assert kept.steps() == [4]
    assert_is(kept.latest(), 4)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def delete(path):
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, delete])
@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "index.json"])
def test_damage_is_named_and_the_one_before_used(tmp_path, harm, name):
    kept = saved(tmp_path, 10, 20)
    harm(kept.path(20) / name)
    with pytest.warns(RuntimeWarning, match=r"step-20: damaged checkpoint refused"):
        assert_is(kept.latest(), 10)


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    kept = saved(tmp_path, 10, 20)
    for step in (10, 20):
        truncate(kept.path(step) / "tensors-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(step-10, step-20"):
        kept.latest()


def test_a_half_written_checkpoint_is_invisible_and_swept_up(tmp_path):
    kept = saved(tmp_path, 10)
    shutil.copytree(kept.path(10), tmp_path / "tmp-20-12345")
    assert_is(kept.latest(), 10)
    kept.save(30, tensors(30), STATE)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-30"]


FULL_DISK = """
import resource, sys, torch
from llama2rt.checkpoint.store import CheckpointError, Store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    Store(sys.argv[1]).save(20, {"big": torch.zeros(100_000)}, {})
except CheckpointError as error:
    print(error)
"""


def test_full_disk_says_so_and_loses_nothing(tmp_path):
    kept = saved(tmp_path, 10)
    done = run_python("-c", FULL_DISK, tmp_path)
    assert "step-20: this checkpoint could not be written" in done.stdout
    assert "step-10 is still the last checkpoint" in done.stdout
    assert os.listdir(tmp_path) == ["step-10"]
    assert_is(kept.latest(), 10)


def test_unwritable_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not be written .*none exists yet"):
        Store(tmp_path / "file" / "checkpoints").save(1, tensors(1), STATE)
