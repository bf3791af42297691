"""One small problem for all stages of RLHF, built once."""

import pocket as problem
import pytest


@pytest.fixture(scope="session")
def pocket(tmp_path_factory) -> problem.Pocket:
    return problem.build(tmp_path_factory.mktemp("pocket"))
