"""The CUDA kernels on the emulator of csrc/emulator: the same Python functions as on a GPU, the
same sources compiled for this CPU. What the numbers must keep to is in `numerics`.
"""

from types import ModuleType, SimpleNamespace

import emulator
import pytest
import torch

from llama2rt.ops import backend


@pytest.fixture(autouse=True)
def one_thread(_same_start: None) -> None:
    """torch's products stand in for cuBLAS's and are the yardstick's: their rounding, and with it
    how much a kernel may be off, must not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """`_emulated`, built when its sources have changed."""
    if reason := emulator.why_not():
        pytest.skip(reason)
    built = emulator.build("_emulated")
    # From here on `ops.use("emulated")` runs every op that has a CUDA kernel on it.
    backend.register("emulated", emulator.functions(built), ("cpu",))
    return built


@pytest.fixture
def emulated(module: ModuleType, seed: int) -> SimpleNamespace:
    """The functions of `llama2rt.ops.cuda_kernels`; the order of threads comes from SEED."""
    module.set_seed(seed)
    print(f"emulator seed {seed}")  # shown when the test fails
    return SimpleNamespace(**emulator.functions(module))
