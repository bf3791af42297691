"""The driver on ranks: a divergence keeps the checkpoint that is being written, energy is that of
all devices, and a scheduler's two signals are one wish wherever they meet rank 0."""

import signal

import json_lines
import pytest
from driven_ranks import (
    asked_to_stop_twice_while_rank_0_works_alone,
    diverge_while_a_checkpoint_is_written,
    drive_with_meters,
)


def test_a_divergence_keeps_the_checkpoint_that_is_being_written(on_ranks, tmp_path):
    first, second = on_ranks(2, diverge_while_a_checkpoint_is_written, tmp_path)
    assert first == second
    assert "the loss is nan at step 3; step-2 is the last good checkpoint. " in first
    assert first.endswith(" [2]")


@pytest.mark.parametrize(
    ("broken", "logged"),
    [
        # 100 J and 200 J of two GPUs, 1000 J of the machine they share.
        (-1, {"joules_per_step": 1300.0, "joules_per_token": 130.0}),
        (1, {"energy": "energy not measured (GPU 1: no counter)"}),
    ],
)
def test_energy_is_that_of_all_ranks_or_of_none(on_ranks, tmp_path, broken, logged):
    on_ranks(2, drive_with_meters, tmp_path, broken)
    (line,) = json_lines.read(tmp_path / "metrics.jsonl")
    unlike = ("step", "index", "slowest_rank", "straggler_ratio")
    assert {key: value for key, value in line.items() if key not in unlike} == logged


def test_two_signals_while_rank_0_works_alone_are_one_wish(on_ranks):
    agreed = on_ranks(2, asked_to_stop_twice_while_rank_0_works_alone)
    assert agreed == [signal.SIGTERM, signal.SIGTERM]
