"""One small problem for all stages of RLHF, built once."""

import pocket as problem
import pytest
import torch


@pytest.fixture(scope="session")
def pocket(tmp_path_factory) -> problem.Pocket:
    torch.set_num_threads(1)
    return problem.build(tmp_path_factory.mktemp("pocket"))


@pytest.fixture(autouse=True)
def _one_thread(_same_start) -> None:
    """Models this small gain nothing from a second thread and lose much when a core is busy."""
    torch.set_num_threads(1)
