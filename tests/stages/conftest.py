"""What the tests of stages share besides the pocket problem."""

import pytest
import torch

from llama2rt.report.plot import Plot


@pytest.fixture(autouse=True)
def _one_thread(_same_start) -> None:
    """Models this small gain nothing from a second thread and lose much when a core is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _pages_without_drawings():
    """matplotlib takes longer than a run this short. tests/quickstart draws the
    pages of all stages but iterate's, which is a table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "svg", lambda plot, salt="": "<svg></svg>")
        yield
