"""Processes of `llama2rt cluster bench`, started by torchrun on the loopback interface."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

TIMEOUT_SECONDS = 300  # reached only where something hangs


def _default_signals() -> None:
    # A shell's background job ignores Ctrl-C, and so would everything below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(program: Sequence[str], ranks: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--no-python", "--", sys.executable, "-P"]
    return subprocess.Popen(
        [*command, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        preexec_fn=_default_signals,
    )


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., tuple[int, str, str]]:
    """``torchrun(program, ranks=2)``: exit status, stdout, stderr of python with that program."""

    def run(program: Sequence[str], ranks: int = 2) -> tuple[int, str, str]:
        process = start(program, ranks)
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        return process.returncode, out, err

    return run


BENCH = ["-m", "llama2rt.cli", "cluster", "bench", "--backend", "gloo"]
