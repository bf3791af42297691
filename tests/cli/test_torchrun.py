"""The command under torchrun itself: a group that it starts anew goes on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
data = ["{text}"]
tokenizer = "{tokenizer}"
context = 16
batch_tokens = 64
steps = 100
model = {{ dim = 16, layers = 1, heads = 2 }}
train = {{ micro_tokens = 32, warmup_steps = 0, checkpoint_every = 5, log_every = 5 }}
"""


def torchrun(*arguments: object) -> "subprocess.Popen[str]":
    program = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", "2", "--max-restarts", "1", "--no-python", "--"]
    return subprocess.Popen(
        [*program, sys.executable, "-P", "-m", "llama2rt.cli", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def ranks(agent: int) -> list[int]:
    """Processes that torchrun has started."""
    found = Path(f"/proc/{agent}/task").glob("*/children")
    return sorted(int(child) for path in found for child in path.read_text().split())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds ranks in /proc")
def test_a_restarted_group_resumes_without_being_told(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over lazy dogs. " * 200)
    paths = {"text": tmp_path / "text.txt", "tokenizer": tmp_path / "tokenizer"}
    (tmp_path / "recipe.toml").write_text(RECIPE.format(**paths))
    out = tmp_path / "out"
    command = torchrun("pretrain", tmp_path / "recipe.toml", "--out", out)
    try:
        end = time.monotonic() + 120
        while not (out / "checkpoints" / "step-5").exists():
            assert command.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(ranks(command.pid)[1], signal.SIGKILL)
        _, said = command.communicate(timeout=180)
    finally:
        command.kill()
    assert command.returncode == 0, said[-3000:]
    manifest = json.loads((out / "manifest.json").read_text())
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "gradient_norm" in line]
    assert manifest["complete"] and steps == list(range(5, 101, 5))
    assert "pretrain: done" in said and said.count("2 ranks on cpu") == 2
