"""Many 16-bit values added into one by the Triton kernels (see `many_terms`)."""

from types import SimpleNamespace

import pytest
import torch
from many_terms import CHECKS

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("check", CHECKS)
def test_sums_have_no_end(check):
    module = pytest.importorskip("llama2rt.ops.triton")
    check(SimpleNamespace(**module.NATIVE), 1024, torch.bfloat16)
