"""As in the tests of stages: one thread, and pages without drawings."""

import pytest
import torch

from llama2rt.report.plot import Plot


@pytest.fixture(autouse=True)
def _one_thread(_same_start) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _pages_without_drawings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "svg", lambda plot, salt="": "<svg></svg>")
        yield
