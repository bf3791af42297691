"""The slow rank is named, and what counts as its work."""

import time

import json_lines
import pytest
import torch
from fault_work import TOTAL, command_of_a_stage
from rank_groups import Group

from llama2rt.train.stragglers import NOTHING, Elapsed, Stragglers, slowest


def test_a_slow_rank_is_named_in_metrics_and_once_in_a_warning(tmp_path):
    """50 ms of sleep in each step of rank 2, on top of everyone's 50."""
    group = Group(3, tmp_path / "said", command_of_a_stage, tmp_path / "out", "slow", 2)
    assert group.wait() == [0, 0, 0], group.said()
    lines = json_lines.read(tmp_path / "out" / "metrics.jsonl")
    assert [line["slowest_rank"] for line in lines] == [2] * TOTAL
    assert all(1.3 < line["straggler_ratio"] < 3 for line in lines)
    said = [line for line in group.said() if "waiting" in line]
    assert len(said) == 1 and said[0].startswith("rank 2 keeps the others waiting: it works 0.1")


def test_slowest_by_hand():
    assert slowest([2.0, 3.0, 2.0, 1.0]) == (1, 1.5)
    assert slowest([1.0, 4.0]) == (1, 4.0)


def test_work_is_what_computes_and_what_prepares():
    begin = Elapsed.now()
    time.sleep(0.2)
    slept = Elapsed.now().since(begin)
    assert slept.wall >= 0.2 and slept.worked < 0.15
    begin = Elapsed.now()
    while time.thread_time() < begin.worked and time.perf_counter() - begin.wall < 0.2:
        pass
    x = torch.ones(300, 300)
    while time.perf_counter() - begin.wall < 0.2:
        x @ x
    computed = Elapsed.now().since(begin)
    assert computed.worked == pytest.approx(computed.wall, rel=0.3)


def test_one_process_reports_nothing():
    stragglers = Stragglers(torch.device("cpu"))
    stragglers.add(Elapsed(1.0, 1.0), NOTHING)
    assert stragglers.read() == {}
