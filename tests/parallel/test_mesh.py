"""Who shares what with whom, by hand, and shapes that cannot be cut."""

import pytest
from parallel_world import CONFIG, groups_after, layout

from llama2rt.errors import InputError
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.parallel.mesh import check


def test_one_process():
    mesh = Mesh.build(ParallelOptions(), CONFIG)
    assert mesh == Mesh.single()
    assert (mesh.batch_rank, mesh.batch_ranks, mesh.group("tensor")) == (0, 1, None)


def test_all_processes_shard_by_default(on_ranks):
    results = on_ranks(4, layout, ParallelOptions())
    assert [result["batch"] for result in results] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(result["fsdp"] == [0, 1, 2, 3] for result in results)
    assert all(result["groups"] == {"shard": [0, 1, 2, 3]} for result in results)


def test_tensor_groups_are_neighbours_and_share_a_batch(on_ranks):
    results = on_ranks(4, layout, ParallelOptions(tensor=2))
    assert [result["batch"] for result in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [result["groups"]["tensor"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["fsdp"] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_replicas_hold_the_sharded_model(on_ranks):
    results = on_ranks(4, layout, ParallelOptions(data=2))
    assert [result["batch"] for result in results] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(result["fsdp"] == [[0, 1], [2, 3]] for result in results)


def test_context_ranks_share_a_batch_and_shard_the_weights(on_ranks):
    results = on_ranks(4, layout, ParallelOptions(context=2))
    assert [result["batch"] for result in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert all(result["fsdp"] == [0, 1, 2, 3] for result in results)


def test_meshes_of_the_same_degrees_share_their_groups(on_ranks):
    hybrid, tensor = ParallelOptions(data=2), ParallelOptions(tensor=2)
    for _, *counts in on_ranks(4, groups_after, hybrid, tensor, hybrid, tensor):
        assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        (ParallelOptions(tensor=3), 4, "tensor 3 needs a multiple of 3 processes, got 4"),
        (ParallelOptions(shard=2), 4, "shard 2 needs 2 processes, got 4"),
        (ParallelOptions(data=2, tensor=2), 2, "data 2, tensor 2 needs a multiple of 4 processes"),
    ],
)
def test_degrees_that_do_not_come_out(options, ranks, message):
    with pytest.raises(InputError, match=message):
        options.degrees(ranks)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor": 4, "pipeline": 1}, "parallel.tensor: 4 processes cannot share kv_heads 2"),
        ({"tensor": 3, "pipeline": 1}, "parallel.tensor: 3 processes cannot share heads 4"),
        ({"tensor": 1, "pipeline": 3}, "parallel.pipeline: 3 stages of a model with 2 layers"),
    ],
)
def test_shapes_that_cannot_be_cut(degrees, message):
    with pytest.raises(InputError, match=message):
        check(degrees, CONFIG)
