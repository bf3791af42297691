"""What a collective moves and must yield: factors by hand, and wrong results that must be seen."""

import pytest
import torch

from llama2rt.cluster.operations import (
    OPERATIONS,
    bandwidths_bytes_per_s,
    pattern,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("operation", "ranks", "bus"),
    # 1 GB in 10 ms is an algorithm bandwidth of 100 GB/s.
    [
        ("all_reduce", 2, 100e9),
        ("all_reduce", 8, 175e9),
        ("all_reduce", 16, 187.5e9),
        ("reduce_scatter", 2, 50e9),
        ("reduce_scatter", 8, 87.5e9),
        ("all_gather", 8, 87.5e9),
        ("all_to_all", 4, 75e9),
        ("broadcast", 2, 100e9),
        ("broadcast", 8, 100e9),
        ("all_reduce", 1, 0.0),
    ],
)
def test_bus_bandwidth_is_that_of_nccl_tests(operation, ranks, bus):
    algorithm, found = bandwidths_bytes_per_s(operation, 10**9, ranks, 0.010)
    assert algorithm == pytest.approx(100e9)
    assert found == pytest.approx(bus)


def result(name: str, rank: int, ranks: int, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The collective's definition, on the inputs of all ranks."""
    if name == "all_reduce":
        return sum(inputs)
    if name == "reduce_scatter":
        return sum(inputs).chunk(ranks)[rank]
    if name == "all_gather":
        return torch.cat(inputs)
    if name == "all_to_all":
        return torch.cat([each.chunk(ranks)[rank] for each in inputs])
    return inputs[0]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("ranks", "elements"), [(2, 2), (3, 9), (4, 4096), (8, 256_000)])
def test_right_results_pass_and_wrong_ones_are_located(name, ranks, elements):
    operation = OPERATIONS[name]
    inputs = [operation.buffers(r, ranks, elements, CPU)[1].clone() for r in range(ranks)]
    for rank in range(ranks):
        output = result(name, rank, ranks, inputs).clone()
        assert operation.first_error(output, rank, ranks, elements) is None
        position = len(output) - 1 - rank % len(output)
        output[position] += 1
        assert f"element {position} is" in operation.first_error(output, rank, ranks, elements)
    untouched, _ = operation.buffers(1, ranks, elements, CPU)
    assert operation.first_error(untouched, 1, ranks, elements) is not None


def test_swapped_chunks_are_seen():
    operation = OPERATIONS["all_gather"]
    ranks, elements = 4, 4096
    inputs = [operation.buffers(r, ranks, elements, CPU)[1] for r in range(ranks)]
    inputs[1], inputs[2] = inputs[2], inputs[1]
    assert "element 1024" in operation.first_error(torch.cat(inputs), 0, ranks, elements)


def test_an_error_far_into_a_large_buffer_is_located():
    operation = OPERATIONS["broadcast"]
    elements = 20_000_000  # more than is compared at once
    output, _ = operation.buffers(0, 2, elements, CPU)
    assert operation.first_error(output, 0, 2, elements) is None
    output[17_000_001] = -1
    assert "element 17000001 is -1.0" in operation.first_error(output, 0, 2, elements)


def test_sums_are_exact_for_as_many_ranks_as_there_are():
    # fp32 holds every integer up to 2^24.
    assert 65_536 * pattern(0).max() < 2**24


def test_memory_is_that_of_both_buffers():
    sizes = {name: op.memory_bytes(8000, 8) for name, op in OPERATIONS.items()}
    assert sizes == {
        "all_reduce": 8000,
        "reduce_scatter": 9000,
        "all_gather": 9000,
        "all_to_all": 16000,
        "broadcast": 8000,
    }
