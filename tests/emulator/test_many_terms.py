"""Many 16-bit values added into one by the CUDA kernels, emulated (see `many_terms`)."""

import pytest
import torch
from many_terms import CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_sums_have_no_end(check, emulated):
    check(emulated, 1024, torch.bfloat16)
