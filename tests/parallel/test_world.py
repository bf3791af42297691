"""Ranks talk to each other, and one process needs nobody."""

import pytest
from parallel_world import fail_on_one, talk
from rank_pool import RankFailed

from llama2rt.errors import InputError
from llama2rt.parallel import World, barrier, broadcast, gather, is_main, on_main, world
from llama2rt.parallel.world import start, stop, until_stop


def test_one_process_is_a_world_of_one():
    barrier()
    assert world() == World(rank=0, size=1)
    assert is_main() and broadcast(3) == 3 and gather(3) == [3] and on_main(lambda: 3) == 3


def test_what_is_kept_until_the_end_is_made_once_and_then_anew():
    made = until_stop(lambda size: [size])
    first = made(4)
    assert made(4) is first and made(2) == [2]
    stop()
    assert made(4) is not first


def test_ranks_talk_and_what_rank_0_does_is_everyones(on_ranks, tmp_path):
    results = on_ranks(4, talk, tmp_path)
    assert all(
        result
        == {
            "said": "rank 0",
            "all": [0, 1, 2, 3],
            "did": "done",
            "error": ("recipe.toml: no", True),
        }
        for result in results
    )
    assert [path.name for path in tmp_path.iterdir()] == ["by-0"]


def test_a_rank_that_fails_is_named_and_the_next_test_has_new_ranks(on_ranks, tmp_path):
    with pytest.raises(RankFailed, match=r"rank 1 of 2: [\s\S]*ValueError: only rank 1"):
        on_ranks(2, fail_on_one)
    assert on_ranks(2, talk, tmp_path)[1]["all"] == [0, 1]


def test_several_processes_need_a_way_to_meet(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="WORLD_SIZE is 4, but RANK, MASTER_ADDR, MASTER_PORT"):
        start()
