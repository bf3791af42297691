"""The command line under torchrun: two processes leave the run directory that one leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_stages import agree, recipe, write_data

from llama2rt.parallel import ParallelOptions
from llama2rt.stages import pretrain, sft

SECONDS = 300  # reached only where something hangs


def _default_signals() -> None:
    # A shell's background job ignores Ctrl-C, and so would everything below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def torchrun(stage: str, recipe_file: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """`llama2rt STAGE` as two processes."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--no-python", "--", sys.executable, "-P"]
    command += ["-m", "llama2rt.cli", stage, str(recipe_file), "--out", str(out), "--json"]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        preexec_fn=_default_signals,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process's pretraining, and its SFT of what that left."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_data(folder / "data")
    parallel = ParallelOptions()
    base = recipe("pretrain", folder / "data", folder, parallel, 1)
    pretrain.run(base, folder / "pretrain")
    tuned = recipe("sft", folder / "data", folder / "pretrain" / "model", parallel, 1)
    sft.run(tuned, folder / "sft")
    return folder


def test_two_processes_leave_what_one_leaves(runs, tmp_path):
    """tests/cli/test_torchrun.py has the command's pretraining under torchrun, and
    test_stages_on_ranks.py what every stage leaves."""
    done = torchrun("sft", runs / "sft" / "recipe.toml", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    # Rank 0 speaks for both.
    assert json.loads(done.stdout)["model"] == str(tmp_path / "run" / "model")
    agree(tmp_path / "run", runs / "sft")


def test_bad_input_is_said_once(runs, tmp_path):
    text = (runs / "sft" / "recipe.toml").read_text()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace("tensor = 1", "tensor = 3"))
    done = torchrun("sft", wrong, tmp_path / "run")
    assert done.stderr.count("parallel.tensor: 3 processes cannot share heads 4") == 1
    assert not (tmp_path / "run").exists()
