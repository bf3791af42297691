"""The linear layer of inference: where it runs the kernel for few rows, and where torch's own."""

import pytest
import torch
from torch.nn import functional as F

from llama2rt import ops
from llama2rt.ops import linear as module
from llama2rt.ops.linear import MOST_ROWS, linear

pytestmark = pytest.mark.skipif(
    "cpu" not in ops.backends("cpu")["swiglu"]["native"], reason="_cpu is not built"
)


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    found = []
    kernel = module._kernel()
    monkeypatch.setattr(module, "_run", lambda *xs: found.append(xs) or kernel(*xs))
    return found


def inputs(rows=2, dtype=torch.bfloat16, **options):
    return torch.randn(rows, 40).to(dtype), torch.randn(30, 40).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, MOST_ROWS])
def test_few_rows_of_16_bits_without_a_gradient_take_the_kernel(calls, rows, dtype):
    x, weight = inputs(rows, dtype)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = linear(x, weight)
        assert y.shape == (rows, 30) and y.dtype == dtype and not y.requires_grad
        torch.testing.assert_close(y, F.linear(x, weight.detach()), rtol=2e-2, atol=2e-2)
    assert len(calls) == 2


def test_all_else_is_torchs_product_to_the_bit(calls):
    x, weight = inputs()
    y = linear(x, weight)
    assert torch.equal(y, F.linear(x, weight))
    y.sum().backward()
    assert weight.grad is not None, "training goes through it"
    with torch.no_grad():
        for x, weight in (inputs(MOST_ROWS + 1), inputs(dtype=torch.float32)):
            assert torch.equal(linear(x, weight), F.linear(x, weight))
        x, weight = inputs()
        assert torch.equal(linear(x[None], weight), F.linear(x[None], weight))
        with ops.use("reference"):
            assert torch.equal(linear(x, weight), F.linear(x, weight))
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, weight.float())
    assert not calls


def test_compile_and_fake_tensors_see_an_op():
    x, weight = inputs()
    with torch.no_grad():
        expected = linear(x, weight)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), expected)
    torch.library.opcheck(module._few_rows_linear, (x, weight.detach()))
