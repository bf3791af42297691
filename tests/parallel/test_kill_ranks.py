"""A few of the kills that tests/helpers/kill_ranks.py takes by the hundred."""

import os
from pathlib import Path

from processes import run_python

HARNESS = Path(__file__).parent.parent / "helpers" / "kill_ranks.py"


def test_a_stage_of_two_ranks_killed_at_random_moments_leaves_the_same(seed):
    options = ["--kills", 4, "--kills-a-run", 4, "--seed", seed, "--stage", "pretrain"]
    path = os.pathsep.join([str(HARNESS.parent), os.environ.get("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = run_python(HARNESS, *options, env=env, timeout_seconds=600)
    assert "4 kills" in done.stdout and "wrong so far 0" in done.stdout, done.stdout
