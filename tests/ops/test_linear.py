"""The linear layer: where it runs the kernel for few rows, where fp32, and where torch's own."""

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


def inputs(rows=2, dtype=torch.bfloat16):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 40), (3, 50, 40)])
def test_16_bits_that_torch_has_no_blocked_product_for_run_in_fp32(monkeypatch, dtype, shape):
    """Forward and both gradients are fp32's, rounded once; what is kept for them is 16-bit."""
    monkeypatch.setitem(module._BLOCKED, dtype, False)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(30, 40).to(dtype).requires_grad_()
    exact = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        y = linear(x, weight)
    assert kept == [dtype, dtype]
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    wanted = F.linear(*exact)
    wanted.backward(dy.float())
    for got, value in ((y, wanted), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert got.dtype == dtype
        # Where fp32 sums in another order, the last bit may be the other one.
        torch.testing.assert_close(got, value.to(dtype), rtol=2**-7, atol=1e-4)
    # Only what is asked for: an adapter's base has no gradient.
    frozen = linear(x, weight.detach())
    (dx,) = torch.autograd.grad(frozen, x, dy)
    assert torch.equal(dx, x.grad)
    compiled = torch.compile(lambda a, b: linear(a, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), y)


def test_all_else_is_torchs_product_to_the_bit(calls, monkeypatch):
    monkeypatch.setattr(module, "_BLOCKED", {})
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


def test_what_the_kernel_does_not_take_is_torchs_to_compute_or_refuse(calls):
    """It is handed addresses: a shape it trusted would be read beyond the end of a weight."""
    x, weight = (tensor.detach() for tensor in inputs())
    with torch.no_grad():
        for odd in (weight[:, :20], weight[None], weight[0, :20]):
            with pytest.raises(RuntimeError):
                linear(x, odd)
        assert torch.equal(linear(x, weight[0]), F.linear(x, weight[0]))
        with torch.autocast("cpu", torch.float16):
            assert linear(x, weight).dtype == torch.float16
        wrapped = linear(x, weight.as_subclass(type("Wrapped", (torch.Tensor,), {})))
        assert torch.equal(wrapped, F.linear(x, weight))
    assert not calls


def test_strides_and_no_rows(calls):
    x, weight = (tensor.detach() for tensor in inputs(3))
    with torch.no_grad():
        expected = linear(x, weight)
        for odd in (weight.T.contiguous().T, torch.cat((weight, weight), 1)[:, :40]):
            assert torch.equal(linear(x.T.contiguous().T, odd), expected)
        assert linear(x[:0], weight).shape == (0, 30)
        assert linear(x, weight[:0]).shape == (3, 0)
        assert torch.equal(linear(x[:, :0], weight[:, :0]), torch.zeros(3, 30).bfloat16())
        by_row = torch.func.vmap(lambda row: linear(row[None], weight)[0])(x)
    torch.testing.assert_close(by_row, expected)
    assert len(calls) == 6, "all but the rows of vmap, which torch calls by the op"


def test_compile_and_fake_tensors_see_an_op():
    x, weight = inputs()
    with torch.no_grad():
        expected = linear(x, weight)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), expected)
    torch.library.opcheck(module._few_rows_linear, (x, weight.detach()))
