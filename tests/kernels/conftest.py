"""Triton kernels in the interpreter, on outputs that start as NaN. On a GPU, tests/gpu has them."""

import mmap

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


@pytest.fixture
def far():
    """`far(x)`: a copy of x whose rows lie 2^30 elements apart, in memory reserved but not filled.

    The stride fits 32 bits and, from the third row on, the offset does not.
    """

    def copy(x: torch.Tensor) -> torch.Tensor:
        stride = 2**30
        size = x.element_size() * (stride * (len(x) - 1) + x[0].numel())
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            memory = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            pytest.skip(f"{size} bytes of address space: {error}")
        apart = torch.frombuffer(memory, dtype=x.dtype).as_strided(
            x.shape, (stride, *x[0].contiguous().stride())
        )
        return apart.copy_(x)

    return copy
