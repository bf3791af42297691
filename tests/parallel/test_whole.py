"""Whole weights out of shards, however they are cut; gone after; refused where they do not fit."""

import pytest
import torch
from parallel_rollouts import gathered_again, model_of, refused

from llama2rt.parallel.whole import in_shards, whole, whole_tensors


def test_without_shards_the_model_is_its_own_copy():
    model = model_of("llama")
    with whole(model, torch.bfloat16) as copy:
        assert copy is model and not in_shards(model)
    assert all(parameter.numel() for parameter in model.parameters())
    for (name, tensor), (same, parameter) in zip(
        whole_tensors(model), model.named_parameters(), strict=True
    ):
        assert name == same and tensor.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize(
    ("kind", "layout", "tied"),
    [
        ("llama", "fsdp", False),
        ("llama", "fsdp", True),
        ("scalar", "fsdp", False),
        ("llama", "hybrid", False),
        ("llama", "tensor", False),
        ("scalar", "tensor", False),
    ],
)
def test_the_copy_is_the_model_in_one_piece(on_ranks, kind, layout, tied):
    for parts in on_ranks(4, gathered_again, kind, layout, tied):
        assert all(parts.values()), parts


def test_a_model_that_no_process_can_hold_is_refused_by_all(on_ranks):
    first, second = on_ranks(2, refused)
    assert first == second
    assert "on each of 2 processes" in first and "0.0 GB" in first
