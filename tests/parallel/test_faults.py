"""A rank that fails, dies, hangs or is asked to stop: one message, no rank left, and a resumed run
that comes to the same."""

import json
import signal
import time

import pytest
from fault_work import TOTAL, command_of_a_stage
from rank_groups import Group

from llama2rt.parallel.faults import Beat, Heard, missing

# Of shared machines: a rank there was once not heard of for three seconds.
LIMIT = 5.0


def reach(out, ranks=2, seconds=60):
    """Wait until the ranks are in step 6."""
    end = time.monotonic() + seconds
    while len(list(out.glob("reached-*"))) < ranks:
        assert time.monotonic() < end
        time.sleep(0.01)


def goes_on(out, size=2):
    """A group that resumes the run in `out` comes to what an undisturbed one does."""
    group = Group(size, out / "again", command_of_a_stage, out)
    assert group.wait() == [0] * size, group.said()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["summary"]["total"] == size * (size + 1) / 2 * sum(range(TOTAL))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, TOTAL + 1))


@pytest.mark.parametrize(
    ("number", "rank", "status"),
    [(signal.SIGTERM, 1, 75), (signal.SIGINT, 0, 1), (signal.SIGUSR1, 1, 75)],
)
def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path, number, rank, status):
    group = Group(2, tmp_path / "said", command_of_a_stage, tmp_path / "out")
    reach(tmp_path / "out")
    group.kill(rank, number)
    assert group.wait() == [status, status]
    (line,) = group.said()
    assert line.startswith("llama2rt sum: stopped after step ")
    step = int(line.split()[5])
    assert line.endswith(f"saved {tmp_path}/out/checkpoints/step-{step}, continue with --resume")
    assert (tmp_path / "out" / "checkpoints" / f"step-{step}").is_dir()
    goes_on(tmp_path / "out")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_is_named_and_ends_the_group(tmp_path, rank):
    group = Group(2, tmp_path / "said", command_of_a_stage, tmp_path / "out")
    reach(tmp_path / "out")
    begin = time.monotonic()
    group.kill(rank, signal.SIGKILL)
    statuses = group.wait()
    assert time.monotonic() - begin < 20
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
    said = " ".join(group.said())
    assert f"rank {rank}" in said or (rank == 0 and "keeps the group's store" in said), said
    goes_on(tmp_path / "out")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_ends_the_group(tmp_path, rank):
    group = Group(2, tmp_path / "said", command_of_a_stage, tmp_path / "out", "", 1, LIMIT)
    reach(tmp_path / "out")
    begin = time.monotonic()
    group.kill(rank, signal.SIGSTOP)
    statuses = group.wait()
    assert time.monotonic() - begin < LIMIT + 15
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
    (line,) = group.said()
    assert line.startswith(f"llama2rt: rank {rank} ")
    goes_on(tmp_path / "out")


def test_a_hanging_rank_is_named_with_what_it_does(tmp_path):
    group = Group(3, tmp_path / "said", command_of_a_stage, tmp_path / "out", "sleep", 1, LIMIT)
    statuses = group.wait()
    assert statuses[0] == statuses[2] == 1, (statuses, group.said())
    assert statuses[1] in (1, -signal.SIGKILL)
    (line,) = group.said()
    assert line == (
        "llama2rt: rank 1 (in step 6) has been waited for by the others for 5 seconds; the group "
        "ends"
    )
    goes_on(tmp_path / "out", 3)


def test_a_rank_that_hangs_in_its_share_of_a_rollout_is_named(tmp_path):
    group = Group(3, tmp_path / "said", command_of_a_stage, tmp_path / "out", "share", 1, LIMIT)
    statuses = group.wait()
    assert statuses[0] == statuses[2] == 1, (statuses, group.said())
    assert statuses[1] in (1, -signal.SIGKILL)
    (line,) = group.said()
    assert line == (
        "llama2rt: rank 1 (in step 6) has stood still in a share of the work for 5 seconds; the "
        "group ends"
    )


def test_errors_and_warnings_are_said_once(tmp_path):
    group = Group(3, tmp_path / "alike", command_of_a_stage, tmp_path / "a", "alike")
    assert group.wait() == [2, 2, 2]
    warning, error = group.said()
    assert warning.startswith("train.warmup_steps: the warm-up of 2 steps is longer")
    assert error == "llama2rt sum: data.jsonl:3: all read the same"
    group = Group(3, tmp_path / "alone", command_of_a_stage, tmp_path / "b", "alone", 2)
    assert group.wait() == [2, 2, 2]
    assert group.said() == ["llama2rt sum: rank 2: data-2.jsonl:3: only here"]


def test_a_defect_of_one_rank_shows_its_traceback(tmp_path):
    group = Group(2, tmp_path / "said", command_of_a_stage, tmp_path / "out", "defect")
    assert group.wait() == [1, 1]
    assert group.said()[0] == "llama2rt sum: rank 1: Traceback (most recent call last):"
    assert group.said()[-1] == "KeyError: 'a defect'"


def heard(entered: int, said: float, moved: float) -> Heard:
    return Heard(Beat(1, entered, "in step 3"), said, moved)


def test_who_is_missing():
    """Seconds 100; a limit of 10."""
    assert missing({0: heard(4, 95, 95), 1: heard(3, 95, 50)}, 100, 10) is None  # 0 has just moved
    assert missing({0: heard(4, 95, 80), 1: heard(4, 95, 50)}, 100, 10) is None  # none waits
    ranks, what = missing({0: heard(4, 95, 80), 1: heard(3, 95, 80)}, 100, 10)
    assert (ranks, what) == (
        [1],
        "rank 1 (in step 3) has been waited for by the others for 10 seconds",
    )
    # Shares may take as long as they like while they come on.
    apart = {0: heard(4, 95, 50), 1: Heard(Beat(1, 4, "in step 3", True, 7), 95, 92)}
    assert missing(apart, 100, 10) is None
    apart[1].hear(Beat(2, 4, "in step 3", True, 7), 101)
    assert missing(apart, 103, 10) == (
        [1],
        "rank 1 (in step 3) has stood still in a share of the work for 10 seconds",
    )
    apart[1].hear(Beat(3, 4, "in step 3", True, 8), 103)
    assert missing(apart, 104, 10) is None
    ranks, what = missing({r: heard(3, 100 - 20 * (r > 0), 95) for r in range(11)}, 100, 10)
    assert ranks == list(range(1, 11))
    assert what.endswith(", 8 (in step 3) and 2 more have not been heard of for 10 seconds")
    assert what.startswith("ranks 1 (in step 3), 2 (")
