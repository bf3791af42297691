"""Kernels of `_cpu` are tested one instruction set at a time, on outputs that start as NaN.

After the tests stands the table of what the compiler made of the CUDA kernels, if it was read.
"""

import pytest
import torch

_cpu = pytest.importorskip("llama2rt._cpu")
CUDA_TABLE = pytest.StashKey[str]()


@pytest.fixture(scope="module")
def keep_cuda_table(request: pytest.FixtureRequest):
    """`keep_cuda_table(text)`: print it after the tests."""

    def keep(text: str) -> None:
        request.config.stash[CUDA_TABLE] = text

    return keep


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if CUDA_TABLE in config.stash:
        terminalreporter.section("CUDA kernels as compiled (csrc/cuda/resources.py)")
        terminalreporter.write_line(config.stash[CUDA_TABLE])


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    """Small tensors, and a machine that may be busy: threads are raised where they matter."""
    torch.set_num_threads(1)


@pytest.fixture(params=_cpu.instruction_sets())
def isa(request: pytest.FixtureRequest):
    before = _cpu.isa()
    _cpu.select(request.param)
    yield request.param
    _cpu.select(before)
