"""Every example runs as it stands, from any folder, and shows what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOWS = {
    "fine_tune.py": "It is Nairobi.",
    "patch_transformers.py": "\n5 6 7 8 9 10 11 12 13 14\n",
    "run_ppo.py": "iteration 12: ",
    "sample.py": "The owl|",
    "train_reward_model.py": '"average": 1.0',
}


def test_all_examples_are_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_example(name, tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert SHOWS[name] in result.stdout
