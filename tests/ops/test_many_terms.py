"""Thousands of 16-bit values added into one, wherever that happens on a CPU (see `many_terms`)."""

from types import SimpleNamespace

import pytest
import torch
from many_terms import CHECKS
from torch import nn

from llama2rt.model import LlamaConfig, ScalarModel
from llama2rt.model.transformer import Linear
from llama2rt.ops import composed, reference

N = 4096
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=["reference", "composed", "native"])
def run(request):
    if request.param == "native":
        return SimpleNamespace(**pytest.importorskip("llama2rt.ops.cpu").NATIVE)
    return {"reference": reference, "composed": composed}[request.param]


@SIXTEEN_BITS
@pytest.mark.parametrize("check", CHECKS)
def test_ops(check, run, dtype):
    check(run, N, dtype)


@SIXTEEN_BITS
def test_linear_layers(dtype):
    layer = Linear(16, 16, bias=False, dtype=dtype)
    nn.init.ones_(layer.weight)
    x = torch.ones(N, 16, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, N))
    wide = Linear(N, 16, bias=False, dtype=dtype)
    nn.init.ones_(wide.weight)
    with torch.no_grad():
        for rows in (1, 8):  # the kernel for a few rows, and the library's product
            y = wide(torch.ones(rows, N, dtype=dtype))
            assert torch.equal(y, torch.full_like(y, N))


@SIXTEEN_BITS
def test_head_of_a_scalar_model(dtype):
    model = ScalarModel(LlamaConfig(16, 1, 2, 2, 32, vocab_size=5, context=8), dtype=dtype)
    model.initialize(0)
    # N documents of one and the same token: N equal rows.
    batch = torch.ones(N, dtype=torch.int64), torch.zeros(N, dtype=torch.int32)
    model(*batch, torch.arange(N + 1, dtype=torch.int32)).sum().backward()
    row = model.hidden(*(x[:1] for x in batch), torch.tensor([0, 1])).float()
    torch.testing.assert_close(model.head.weight.grad.float(), N * row, rtol=2**-7, atol=0)
