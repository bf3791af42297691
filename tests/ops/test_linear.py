"""The linear layer: where it runs our kernels of few and of many rows, where fp32, and where
torch's own."""

import pytest
import torch
from torch.nn import functional as F

from llama2rt import ops
from llama2rt.ops import linear as module
from llama2rt.ops.linear import MANY_ROWS, MOST_ROWS, linear

pytestmark = pytest.mark.skipif(
    "cpu" not in ops.backends("cpu")["swiglu"]["native"], reason="_cpu is not built"
)


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    return recorded(monkeypatch, "linear")


@pytest.fixture
def many(monkeypatch):
    """How often the kernel of many rows ran, on a processor that it is for."""
    monkeypatch.setattr(module, "_own_blocked", lambda: True)
    monkeypatch.setitem(module._BY_ONEDNN, torch.bfloat16, True)
    return recorded(monkeypatch, "blocked_linear")


def recorded(monkeypatch, name):
    found = []
    kernel = getattr(module._native(), name)
    monkeypatch.setattr(module._native(), name, lambda *xs: found.append(xs) or kernel(*xs))
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
    monkeypatch.setitem(module._BY_ONEDNN, dtype, False)
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
    monkeypatch.setattr(module, "_own_blocked", lambda: False)
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
    assert len(calls) == 6 + 3, "the rows of vmap too, by the op"


def test_compile_and_fake_tensors_see_an_op():
    x, weight = inputs()
    with torch.no_grad():
        expected = linear(x, weight)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight), expected)
    torch.library.opcheck(torch.ops.llama2rt.few_rows_linear.default, (x, weight.detach()))


def large(rows=MANY_ROWS + 3, columns=70, inner=45):
    x = torch.randn(rows, inner).bfloat16().requires_grad_()
    return x, torch.randn(columns, inner).bfloat16().requires_grad_()


def test_many_rows_of_bf16_take_the_kernel_forward_and_backward(many):
    """Values and both gradients are those of sums in fp32, rounded once."""
    x, weight = large()
    exact = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x, weight)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()], "nothing new is kept"
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    wanted = F.linear(*exact)
    wanted.backward(dy.float())
    for got, value in ((y, wanted), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, value.bfloat16(), rtol=2**-7, atol=1e-4)
    assert len(many) == 2, "forward, and the gradient of x"


def test_many_rows_round_alike_in_any_number(many):
    x, weight = large()
    with torch.no_grad():
        longer = linear(torch.cat((x, x, x)), weight)
        assert torch.equal(linear(x, weight), longer[-len(x) :])
        assert torch.equal(linear(x.T.contiguous().T, weight.T.contiguous().T), longer[: len(x)])
    assert len(many) == 3


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradient_that_is_asked_for_is_computed(many, frozen):
    operands = list(large())
    operands[frozen] = operands[frozen].detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(*operands)
    assert [t.data_ptr() for t in kept] == [operands[frozen].data_ptr()]
    y.sum().backward()
    assert operands[1 - frozen].grad is not None and len(many) == (1 if frozen == 0 else 2)


def test_a_second_derivative_of_many_rows_is_refused(many):
    x, weight = large()
    with pytest.raises(NotImplementedError, match="without create_graph"):
        torch.autograd.grad(linear(x, weight).sum(), x, create_graph=True)


def test_what_is_not_for_the_kernel_of_many_rows_is_torchs(many):
    x, weight = (tensor.detach() for tensor in large())
    less, single = x[: MANY_ROWS - 1], (x.float(), weight.float())
    for odd in ((less, weight), single, (x[None], weight), (x, weight[0])):
        assert torch.equal(linear(*odd), F.linear(*odd))
    for odd in (weight[:, :20], weight[None], weight.float()):
        with pytest.raises(RuntimeError):
            linear(x, odd)
    with ops.use("reference"):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight).dtype == torch.float16
    assert not many


def test_transforms_and_several_gradients_at_once_go_through_torchs_product(many):
    x, weight = (tensor.detach() for tensor in large())
    wanted, stack = F.linear(x, weight), torch.stack((x, -x))
    assert torch.equal(torch.func.vmap(lambda a: linear(a, weight))(stack)[0], wanted)
    tangent = torch.func.jvp(lambda a: linear(a, weight), (x,), (x,))[1]
    assert torch.equal(tangent, wanted)
    gradient = torch.func.grad(lambda w: linear(x, w).float().sum())(weight)
    torch.testing.assert_close(gradient[0], x.float().sum(0).bfloat16(), rtol=2**-6, atol=1e-2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(linear(dual, weight))[1], wanted)
    assert not many
    operands = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    dy = torch.randn(3, len(x), len(weight)).bfloat16()
    y = linear(*operands)
    at_once = torch.autograd.grad(y, operands, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        apart = torch.autograd.grad(y, operands, dy[i], retain_graph=True)
        for one, several in zip(apart, at_once, strict=True):
            torch.testing.assert_close(several[i], one, rtol=2**-6, atol=1e-2)


def test_a_large_weight_wants_more_rows(many):
    weight = torch.randn(1025, 1024).bfloat16()
    with torch.no_grad():
        for rows, calls in ((module.MORE_ROWS - 1, 0), (module.MORE_ROWS, 1)):
            linear(torch.randn(rows, 1024).bfloat16(), weight)
            assert len(many) == calls


@pytest.mark.parametrize("rows, columns, inner", [(300, 0, 32), (300, 24, 0), (0, 24, 32)])
def test_sums_of_nothing(many, rows, columns, inner):
    x = torch.randn(rows, inner).bfloat16().requires_grad_()
    weight = torch.randn(columns, inner).bfloat16().requires_grad_()
    y = linear(x, weight)
    y.sum().backward()
    assert not y.detach().any() or inner
    assert not x.grad.any() or columns
    assert not weight.grad.any() or rows
    native = module._native()
    assert torch.equal(native.blocked_linear(x.detach(), weight.detach()), F.linear(x, weight))


def test_operators_of_many_rows(many):
    x, weight = (tensor.detach() for tensor in large())
    own, dy = torch.ops.llama2rt, torch.randn(len(x), 70).bfloat16()
    torch.library.opcheck(own.blocked_linear.default, (x, weight, False))
    torch.library.opcheck(own.blocked_linear.default, (dy, weight, True))
    torch.library.opcheck(own.weight_gradient.default, (dy, x))
