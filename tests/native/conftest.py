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


@pytest.fixture
def poisoned():
    """torch.empty returns NaN (or the largest integer), so an unwritten element is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
