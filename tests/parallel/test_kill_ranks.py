"""A few of the kills that tests/helpers/kill_ranks.py takes by the hundred."""

import os
from pathlib import Path

import kill_plan
from processes import run_python

HARNESS = Path(__file__).parent.parent / "helpers" / "kill_ranks.py"


def test_a_stage_of_two_ranks_killed_at_random_moments_leaves_the_same(seed):
    options = ["--kills", 4, "--kills-a-run", 4, "--seed", seed, "--stage", "pretrain"]
    path = os.pathsep.join([str(HARNESS.parent), os.environ.get("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = run_python(HARNESS, *options, env=env, timeout_seconds=600)
    assert "4 kills" in done.stdout and "wrong so far 0" in done.stdout, done.stdout


def test_what_counts_as_another_result(tmp_path):
    """Not where a run lies, which the pairs of online DPO say of the policy that answered."""
    for name, answer in (("whole", "yes"), ("killed", "yes"), ("wrong", "no")):
        folder = tmp_path / name / "iteration-2"
        folder.mkdir(parents=True)
        policy = f"{tmp_path / name}/iteration-1/model"
        (folder / "pairs.jsonl").write_text(f'{{"chosen": "{answer}", "source": "{policy}"}}\n')
    whole, killed, wrong = (kill_plan.results(tmp_path / n) for n in ("whole", "killed", "wrong"))
    assert kill_plan.differences(whole, killed) == []
    assert kill_plan.differences(whole, wrong) == ["iteration-2/pairs.jsonl"]
