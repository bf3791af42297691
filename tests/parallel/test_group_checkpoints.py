"""Checkpoints of several ranks: read by any number of them, and as safe as those of one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from group_checkpoints import (
    STATE,
    all_damaged,
    full_disk,
    generator,
    other_names,
    read,
    read_sharded_linear,
    save,
    save_sharded_linear,
    training_goes_on,
    unwritable,
    whole,
)
from processes import run_python

from llama2rt.checkpoint.store import CheckpointError, Store

HELPERS = Path(__file__).parents[1] / "helpers"


def read_alone(folder) -> tuple[int, dict]:
    """(step, state) of what this process finds, whose tensors are whole ones."""
    found = Store(folder).latest()
    assert found is not None
    step, tensors, state = found
    own = tensors.pop("generator.torch")
    assert torch.equal(own, generator(0))
    expected = whole(step)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    return step, state


@pytest.mark.parametrize("layout", ["4", "rows x columns", "replicas"])
def test_written_by_four_and_read_by_one_two_four_and_another_mesh(on_ranks, tmp_path, layout):
    assert on_ranks(4, save, tmp_path, layout, 1, 2, 3) == [[2, 3]] * 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-2", "step-3"]
    assert read_alone(tmp_path) == (3, STATE | {"rank": 0})
    for size, layouts in ((4, ("4", "rows x columns", "replicas")), (2, ("2",))):
        for other in layouts:
            results = on_ranks(size, read, tmp_path, other)
            assert all(result["step"] == 3 and result["same"] for result in results)
            # As many ranks as saved: to each its own generator and state.
            assert [result["generator"] for result in results] == [[r] for r in range(size)]
            assert [result["rank"] for result in results] == list(range(size))


def test_what_ranks_hold_alike_is_written_once(on_ranks, tmp_path):
    on_ranks(4, save, tmp_path, "replicas", 1)
    on_ranks(4, save, tmp_path, "4", 2)
    sizes = []
    for step in (1, 2):
        index = json.loads(
            (tmp_path / f"step-{step}" / "index.json").read_text().rpartition("\n")[0]
        )
        assert index["ranks"] == 4
        own = 4 * generator(0).nbytes
        files = (tmp_path / f"step-{step}").glob("*.safetensors")
        # The data of safetensors lies behind a header, whose length its first 8 bytes say.
        data = [(f.read_bytes(), f) for f in files]
        sizes.append(sum(len(b) - 8 - int.from_bytes(b[:8], "little") for b, _ in data) - own)
    assert sizes == [sum(tensor.nbytes for tensor in whole(1).values())] * 2


def test_tensor_parallel_and_fsdp_shards_of_one_dimension(on_ranks, tmp_path):
    placements = on_ranks(4, save_sharded_linear, tmp_path)
    assert "_StridedShard" in placements[0], "torch no longer shards this way: choose another case"
    assert on_ranks(4, read_sharded_linear, tmp_path) == [True] * 4
    torch.manual_seed(5)
    expected = torch.nn.Linear(8, 24, bias=False).weight
    assert torch.equal(Store(tmp_path).latest()[1]["0.weight"], expected)


def test_a_group_reads_what_one_process_wrote(on_ranks, tmp_path):
    tensors = whole(7) | {"generator.torch": generator(0)}
    Store(tmp_path).save(7, tensors, STATE)
    for size, layout in ((4, "rows x columns"), (2, "2")):
        results = on_ranks(size, read, tmp_path, layout)
        assert all(result["step"] == 7 and result["same"] for result in results)
        assert all(result["generator"] == [0] for result in results)
    # And goes on in the same folder.
    assert on_ranks(2, save, tmp_path, "2", 8) == [[7, 8]] * 2
    assert read_alone(tmp_path)[0] == 8


def test_more_ranks_than_wrote_it(on_ranks, tmp_path):
    on_ranks(2, save, tmp_path, "2", 5)
    results = on_ranks(4, read, tmp_path, "4")
    assert all(result["step"] == 5 and result["same"] for result in results)
    assert [result["generator"] for result in results] == [[0], [1], [0], [0]]
    assert [result["rank"] for result in results] == [0, 1, 0, 0]


def test_steps_go_on_while_it_is_written(on_ranks, tmp_path):
    for result in on_ranks(4, training_goes_on, tmp_path):
        assert result == {"before": [], "after": [1], "found": 1}


@pytest.mark.parametrize("how", ["wait", "save", "check"])
def test_a_full_disk_of_one_rank_is_the_same_error_on_all_and_loses_nothing(
    on_ranks, tmp_path, how
):
    results = on_ranks(2, full_disk, tmp_path, how)
    assert results[0] == results[1]
    assert results[0]["left"] == ["step-10"] and results[0]["found"] == 10
    assert "step-20: this checkpoint could not be written (rank 1: " in results[0]["said"]
    assert "File too large" in results[0]["said"]
    assert "step-10 is still the last checkpoint" in results[0]["said"]


def test_a_folder_that_cannot_be_made(on_ranks, tmp_path):
    (tmp_path / "file").write_text("in the way")
    first, second = on_ranks(2, unwritable, tmp_path)
    assert first == second
    assert "step-1: this checkpoint could not be written (rank 0: " in first
    assert "none exists yet" in first


def damaged(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_damage_is_seen_by_all_ranks_and_the_one_before_used(on_ranks, tmp_path):
    """Whichever file it is, and whoever wrote or checks it."""
    files = ["tensors-00000-00000.safetensors", "tensors-00001-00000.safetensors", "index.json"]
    for step, name in enumerate(files, start=2):
        on_ranks(2, save, tmp_path, "2", step - 1, step)
        damaged(tmp_path / f"step-{step}" / name)
        results = on_ranks(2, read, tmp_path, "2")
        assert [result["step"] for result in results] == [step - 1] * 2
        assert [len(result["warnings"]) for result in results] == [1, 0]
        assert f"step-{step}: damaged checkpoint refused ({name}" in results[0]["warnings"][0]
    (tmp_path / "step-3" / "tensors-00001-00000.safetensors").unlink()
    first, second = on_ranks(2, all_damaged, tmp_path)
    assert first == second and "every checkpoint is damaged (step-3, step-4)" in first
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        Store(tmp_path).latest()


def test_names_and_shapes_that_differ(on_ranks, tmp_path):
    on_ranks(2, save, tmp_path, "2", 1)
    for result in on_ranks(2, other_names, tmp_path):
        assert result["kinds"] == {
            "master.a": "DTensor",
            "generator.torch": "Tensor",
            "master.half": "Tensor",
            "master.three": "Tensor",
            "empty": "Tensor",
            "step.a": "Tensor",
        }
        assert "master.a: expected shape [8, 33], got [33, 8]" in result["said"]


def test_ranks_killed_while_they_write_leave_the_last_checkpoint_or_the_one_before():
    """A few of the kills that tests/helpers/kill_writers.py makes by the hundred."""
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    done = run_python(
        HELPERS / "kill_writers.py", "--kills", "8", env={"PYTHONPATH": path}, timeout_seconds=300
    )
    assert "8 kills" in done.stdout and ": 0 found wrong" in done.stdout
