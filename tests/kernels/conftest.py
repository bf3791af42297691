"""Triton kernels in the interpreter. On a GPU, tests/gpu has them."""

import pytest


@pytest.fixture
def interpreted():
    """A skip where kernels are compiled rather than interpreted in this process."""
    from llama2rt import kernels

    if not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off (it is on without a GPU, or TRITON_INTERPRET=1)")
