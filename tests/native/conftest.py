"""Kernels of `_cpu` are tested one instruction set at a time, on outputs that start as NaN."""

import pytest
import torch

_cpu = pytest.importorskip("llama2rt._cpu")


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
