"""Triton kernels in the interpreter, on outputs that start as NaN. On a GPU, tests/gpu has them."""

import pytest
import torch


@pytest.fixture
def interpreted():
    """A skip where kernels are compiled rather than interpreted in this process."""
    from llama2rt import kernels

    if not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off (it is on without a GPU, or TRITON_INTERPRET=1)")


@pytest.fixture
def poisoned():
    """torch.empty returns NaN (or the largest integer), so an unwritten element is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
