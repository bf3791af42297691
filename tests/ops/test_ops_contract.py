"""The promises every op makes, on every backend this machine has: registration, errors, choice."""

import re
from unittest import mock

import pytest
import torch
from processes import run_python
from torch import Tensor

from llama2rt import ops
from llama2rt.ops import backend
from llama2rt.ops.contract import token_logprob as contract

USABLE = [name for name in backend.NAMES if not backend._why_not(name, "cpu")]
CU = torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32)  # an empty document and one of one token


@pytest.fixture(params=USABLE)
def on_backend(request: pytest.FixtureRequest):
    with ops.use(request.param):
        yield request.param


def arguments(op: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list]:
    """(differentiable inputs, the rest) of a small call."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    table = torch.float64 if dtype == torch.float64 else torch.float32
    angle = torch.rand(12, 4, dtype=table)
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4, 11], dtype=torch.int32)
    targets = torch.tensor([1, -1, 12, 0, 5, 5, -1, 3, 2, 9])
    return {
        "rms_norm": lambda: ([random(10, 7), random(7)], [1e-5]),
        "add_rms_norm": lambda: ([random(10, 7), random(10, 7), random(7)], [1e-5]),
        "swiglu": lambda: ([random(10, 7), random(10, 7)], []),
        "rope": lambda: (
            [random(10, 4, 8), random(10, 2, 8)],
            [angle.cos(), angle.sin(), positions],
        ),
        "attention": lambda: ([random(10, 4, 8), random(10, 2, 8), random(10, 2, 8)], [CU]),
        "token_logprob": lambda: ([random(10, 6), random(13, 6)], [targets]),
    }[op]()


DIFFERENTIABLE = [name for name in backend.OPS if name != "decode_attention"]
KEYWORDS: dict[str, list[dict]] = {
    "attention": [{}, {"causal": False, "scale": 0.3}],
    "token_logprob": [{}, {"temperature": 0.7, "entropy": True}],
}


def cases() -> list:
    return [(op, kw) for op in DIFFERENTIABLE for kw in KEYWORDS.get(op, [{}])]


@pytest.mark.parametrize(("op", "keywords"), cases())
def test_gradcheck(op, keywords, on_backend):
    leaves, rest = arguments(op, torch.float64)

    def call(*inputs):
        return getattr(ops, op)(*inputs, *rest, **keywords)

    assert torch.autograd.gradcheck(call, leaves)


def all_rows_stay():
    """In token_logprob those without a target too, as in a compiled graph."""
    return mock.patch.object(contract, "predicted_rows", return_value=None)


@pytest.mark.parametrize("keywords", KEYWORDS["token_logprob"])
def test_gradcheck_with_rows_without_a_target(keywords, on_backend):
    with all_rows_stay():
        test_gradcheck("token_logprob", keywords, on_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_target_cost_and_give_nothing(dtype, on_backend):
    """Bit for bit what a call without them gives."""
    (hidden, weight), (targets,) = arguments("token_logprob", dtype)
    rows = (targets >= 0).nonzero()[:, 0]
    results, gradients = [], []
    for h, wanted in ((hidden, targets), (hidden.index_select(0, rows), targets[rows])):
        logprob, entropy = ops.token_logprob(h, weight, wanted, temperature=0.7, entropy=True)
        results.append((logprob, entropy))
        gradients.append(torch.autograd.grad((logprob - entropy).sum(), (hidden, weight)))
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[rows], part) and not whole[targets < 0].any()
    for whole, part in zip(*gradients, strict=True):
        assert torch.equal(whole, part)
    with all_rows_stay():
        kept = ops.token_logprob(hidden, weight, targets, temperature=0.7, entropy=True)
    for one, other in zip(results[0], kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_bottom_right_alignment(on_backend):
    q = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(8, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu_q, cu_k = torch.tensor([0, 1, 4]), torch.tensor([0, 5, 8])
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v, causal=causal: ops.attention(
                q, k, v, cu_q, cu_seqlens_k=cu_k, causal=causal
            ),
            (q, k, v),
        )


def registered(name: str, choice: str) -> tuple:
    """Arguments of torch.ops.llama2rt.<name>, recorded from a real call."""
    op = name.removesuffix("_backward").removesuffix("_stashed")
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is getattr(torch.ops.llama2rt, name).default:
                seen.append(args)
            return function(*args, **(kwargs or {}))

    leaves, rest = arguments(op)
    keywords = KEYWORDS.get(op, [{}])[-1]
    with ops.use(choice), all_rows_stay(), Record():
        result = getattr(ops, op)(*leaves, *rest, **keywords)
        result = result if isinstance(result, tuple) else (result,)
        sum(part.sum() for part in result).backward()
    return seen[0]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", [*DIFFERENTIABLE, "token_logprob_stashed"])
def test_opcheck(op, backward, on_backend, monkeypatch):
    stashes = backend.has_native("token_logprob_stashed", on_backend, torch.float32)
    if op == "token_logprob_stashed" and not stashes:
        pytest.skip(f"backend {on_backend} stashes no logits")
    if op == "token_logprob":
        monkeypatch.setattr(contract, "_can_stash", lambda *_: False)
    name = f"{op}_backward" if backward else op
    values = registered(name, on_backend)
    values = tuple(
        v.detach().requires_grad_(not backward and v.is_floating_point() and i < 3)
        if isinstance(v, Tensor)
        else v
        for i, v in enumerate(values)
    )
    if op == "rope":  # the tables are constants
        values = (*values[:2], *(v.detach() for v in values[2:5]), *values[5:])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op != "token_logprob_stashed":  # which never enters a compiled graph
        checks.append("test_aot_dispatch_dynamic")
    overload = getattr(torch.ops.llama2rt, name).default
    torch.library.opcheck(overload, values, test_utils=checks)


def decode_arguments() -> list[Tensor]:
    cache = torch.randn(2, 5, 4, 2, 8).unbind()
    table = torch.tensor([[3, 1], [2, 0], [4, 4]], dtype=torch.int32)
    return [torch.randn(3, 4, 8), *cache, table, torch.tensor([7, 0, 3], dtype=torch.int32)]


@pytest.mark.parametrize("cu_q", [None, torch.tensor([0, 0, 2, 3])])
def test_opcheck_decode_attention(cu_q, on_backend):
    overload = torch.ops.llama2rt.decode_attention.default
    torch.library.opcheck(overload, (*decode_arguments(), 0.25, cu_q, on_backend))


def test_compiled_decode_attention_of_several_queries(on_backend):
    arguments, cu_q = decode_arguments(), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(ops.decode_attention, fullgraph=True, backend="aot_eager")
    got = compiled(*arguments, cu_seqlens_q=cu_q)
    torch.testing.assert_close(got, ops.decode_attention(*arguments, cu_seqlens_q=cu_q))


def model_like(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Every differentiable op in one graph."""
    y, summed = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
    heads = ops.swiglu(y, summed).view(10, 2, 8)
    q, k = ops.rope(heads, heads[:, :1], cos, sin, positions)
    hidden = ops.attention(q, k, k, CU).flatten(1)
    logprob, entropy = ops.token_logprob(
        hidden, weight.expand(5, 16) * hidden[:5], positions % 5, temperature=0.9, entropy=True
    )
    return (logprob + entropy).sum()


def test_compile_fullgraph_equals_eager(on_backend):
    angle, positions = torch.rand(12, 4), torch.arange(10)
    x, weight = torch.randn(10, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    rest = (angle.cos(), angle.sin(), positions)
    torch._dynamo.reset()
    compiled = torch.compile(model_like, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (model_like, compiled):
        gradients.append(torch.autograd.grad(function(x, weight, *rest), (x, weight)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # inference takes another way through the wrapper
        torch.testing.assert_close(model_like(x, weight, *rest), compiled(x, weight, *rest))


def test_compile_notices_a_change_of_backend():
    torch._dynamo.reset()
    seen = []
    compiled = torch.compile(
        lambda x: ops.swiglu(x, x), fullgraph=True, backend=lambda g, _: seen.append(str(g)) or g
    )
    x = torch.randn(3, 4)
    for name in USABLE:
        with ops.use(name):
            compiled(x)
    assert len(seen) == len(USABLE)
    assert all(f"'{name}'" in text for name, text in zip(USABLE, seen, strict=True))


def test_inductor_fullgraph():
    torch._dynamo.reset()
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8)

    def layer(x):
        return (ops.swiglu(ops.rms_norm(x, weight, 1e-5), x) * 2).sum()

    (ours,) = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x), x)
    (eager,) = torch.autograd.grad(layer(x), x)
    torch.testing.assert_close(ours, eager)


def strided(x: Tensor) -> Tensor:
    """The same values behind strides that are not contiguous."""
    wide = torch.stack((x, torch.full_like(x, torch.nan)), -1) if x.is_floating_point() else None
    return x if wide is None else wide[..., 0]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_any_strides_and_inputs_left_alone(op, on_backend):
    leaves, rest = arguments(op)
    keywords = KEYWORDS.get(op, [{}])[-1]

    def run(inputs, extra, upstream):
        inputs = [x.detach().requires_grad_() for x in inputs]
        result = getattr(ops, op)(*inputs, *extra, **keywords)
        result = result if isinstance(result, tuple) else (result,)
        grads = torch.autograd.grad(result, inputs, [upstream(r) for r in result])
        return [*result, *grads]

    copies = [x.detach().clone() for x in leaves]
    plain = run(leaves, rest, torch.ones_like)
    odd = run(
        [strided(x.detach()) for x in leaves],
        rest,
        lambda r: torch.ones(()).expand(r.shape),  # stride 0, as .sum().backward() gives
    )
    for one, other in zip(plain, odd, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, copy) for x, copy in zip(leaves, copies, strict=True))


class Wrapped(Tensor):
    """A tensor without memory of its own, as DTensor is; its operations are those of `inner`."""

    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))


@pytest.mark.parametrize("op", backend.OPS)
def test_no_kernel_reads_the_address_of_a_wrapper(op, on_backend):
    leaves, rest = (decode_arguments(), []) if op == "decode_attention" else arguments(op)
    leaves = [x.detach() for x in leaves]
    with torch.no_grad():
        expected = getattr(ops, op)(*leaves, *rest)
        for i in range(len(leaves)):
            wrapped = [Wrapped(x) if i == j else x for j, x in enumerate(leaves)]
            torch.testing.assert_close(getattr(ops, op)(*wrapped, *rest), expected)


@pytest.mark.parametrize("op", backend.OPS)
def test_vmap_without_gradients(op, on_backend):
    leaves, rest = (decode_arguments(), []) if op == "decode_attention" else arguments(op)
    leaves = [x.detach() for x in leaves]
    call = getattr(ops, op)
    with torch.no_grad():
        pair = torch.func.vmap(lambda x: call(x, *leaves[1:], *rest))(
            torch.stack((leaves[0], 2 * leaves[0]))
        )
        for i in (0, 1):
            one = call((i + 1) * leaves[0], *leaves[1:], *rest)
            got = tuple(x[i] for x in pair) if isinstance(pair, tuple) else pair[i]
            torch.testing.assert_close(got, one)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_are_refused(op, on_backend):
    """Kernels have none: without an error, terms of a gradient penalty would be missing."""
    leaves, rest = arguments(op)
    result = getattr(ops, op)(*leaves, *rest)
    first = result[0] if isinstance(result, tuple) else result
    with pytest.raises(NotImplementedError, match=f"llama2rt::{op}.*create_graph"):
        torch.autograd.grad(first.sum(), leaves, create_graph=True)


def test_empty_tensors(on_backend):
    none = torch.zeros(1, dtype=torch.int32)
    x, w = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    ops.rms_norm(x, w, 1e-5).sum().backward()
    assert torch.equal(w.grad, torch.zeros(8))
    assert ops.add_rms_norm(x, x, w, 1e-5)[0].shape == (0, 8)
    assert ops.swiglu(x, x).shape == (0, 8)
    heads = torch.empty(0, 2, 4, requires_grad=True)
    table = torch.ones(3, 2)
    assert ops.rope(heads, heads, table, table, none[:0])[0].shape == (0, 2, 4)
    alone = torch.randn(3, 2, 4, requires_grad=True)
    both = ops.rope(alone, alone, table, table, none.expand(3))
    queries = ops.rope(alone, alone.detach()[:, :0], table, table, none.expand(3))
    assert torch.equal(queries[0], both[0]) and queries[1].shape == (3, 0, 4)
    queries[0].sum().backward()
    torch.testing.assert_close(alone.grad, torch.autograd.grad(both[0].sum(), alone)[0])
    ops.attention(heads, heads, heads, none).sum().backward()
    weight = torch.randn(5, 8, requires_grad=True)
    ops.token_logprob(x, weight, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(5, 8))
    caches = torch.randn(2, 3, 4, 2, 4).unbind()
    table = torch.empty(0, 2, dtype=torch.int32)
    assert ops.decode_attention(heads, *caches, table, none[:0]).shape == (0, 2, 4)
    nothing = ops.decode_attention(heads, *caches, table, none[:0], cu_seqlens_q=none)
    assert nothing.shape == (0, 2, 4)


def test_leading_dimensions_of_rowwise_ops(on_backend):
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-5)[1], ops.rms_norm(x[1], w, 1e-5))
    torch.testing.assert_close(ops.swiglu(x, x)[1], ops.swiglu(x[1], x[1]))
    torch.testing.assert_close(
        ops.add_rms_norm(x, x, w, 1e-5)[0][1], ops.rms_norm(2 * x[1], w, 1e-5)
    )
    torch.testing.assert_close(ops.rms_norm(x[0, 0], w, 1e-5), ops.rms_norm(x[0, :1], w, 1e-5)[0])


def test_half_of_add_rms_norm_unused(on_backend):
    x, r, w = (torch.randn(s, requires_grad=True) for s in ((4, 8), (4, 8), (8,)))
    ops.add_rms_norm(x, r, w, 1e-5)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 8)) and w.grad is None


H = torch.randn(10, 4, 8)
K = torch.randn(10, 2, 8)
TABLE = torch.rand(12, 4)
IDS = torch.zeros(10, dtype=torch.int64)
X, W = torch.randn(10, 6), torch.randn(13, 6)
BAD = [
    ("rms_norm", (X, W[0, :5], 1e-5), r"weight: expected shape \[6\], got \[5\]"),
    ("rms_norm", (X, W[0].double(), 1e-5), r"weight: expected dtype .*float32.*got .*float64"),
    ("rms_norm", (IDS, IDS, 1e-5), "x: expected a floating-point dtype"),
    ("rms_norm", (X, W[0].to("meta"), 1e-5), r"weight: expected device cpu .*got meta"),
    ("add_rms_norm", (X, X[:3], W[0], 1e-5), r"residual: expected shape \[10, 6\], got \[3, 6\]"),
    ("swiglu", (X, X.T), r"up: expected shape \[10, 6\], got \[6, 10\]"),
    ("rope", (H, K, TABLE[:, :3], TABLE[:, :3], IDS), r"cos: expected shape \[P, 4\]"),
    ("rope", (H[..., :7], K, TABLE, TABLE, IDS), r"q: expected shape \[T, Hq, D\] with D even"),
    ("rope", (H, K, TABLE, TABLE[:5], IDS), r"sin: expected shape \[12, 4\], got \[5, 4\]"),
    ("rope", (H, K, TABLE, TABLE, IDS.float()), "positions: expected dtype int32 or int64"),
    ("attention", (H, K[:, :1].expand(10, 3, 8), K, CU), r"k: expected shape .*Hkv dividing 4"),
    ("attention", (H, K, K[:9], CU), r"v: expected shape \[10, 2, 8\], got \[9, 2, 8\]"),
    ("attention", (H, K[:9], K[:9], CU), r"k: expected shape \[10, 2, 8\], got \[9, 2, 8\]"),
    ("attention", (H, K, K, CU[None]), r"cu_seqlens: expected shape \[B\+1\]"),
    ("token_logprob", (X, W[:, :5], IDS), r"weight: expected shape \[13, 6\], got \[13, 5\]"),
    ("token_logprob", (X, W, IDS[:4]), r"targets: expected shape \[10\], got \[4\]"),
]
# Seen only in the data, which a GPU backend does not wait for.
BAD_VALUES = [
    ("rope", (H, K, TABLE, TABLE, IDS + 12), "positions: "),
    ("rope", (H, K, TABLE, TABLE, IDS - 1), "positions: "),
    ("attention", (H, K, K, CU[:-1]), "cu_seqlens: expected offsets rising from 0 to 10"),
    ("attention", (H, K, K, CU.flip(0)), "cu_seqlens: expected offsets rising from 0 to 10"),
    (
        "token_logprob",
        (X, W, IDS + 13),
        "targets: expected ids below the vocabulary size 13, got 13",
    ),
]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, r"block_table: expected shape \[10, 3\], got \[2, 3\]"),
        ({"cu_seqlens_q": CU}, r"cu_seqlens_q: expected shape \[3\], got \[5\]"),
        ({"cu_seqlens_q": CU.float()[:3]}, "cu_seqlens_q: expected dtype int32 or int64"),
        ({"cu_seqlens_q": CU[:3], "lengths": CU[:3]}, r"lengths: expected shape \[2\], got \[3\]"),
    ],
)
def test_argument_errors_of_decode_attention(changed, message, on_backend):
    caches, table = torch.randn(2, 6, 4, 2, 8), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(H, *caches, table, **{"lengths": CU[:2], **changed})


@pytest.mark.parametrize("bad", [CU[:3], CU[[4, 0, 4]], CU[[1, 1, 4]]])
@pytest.mark.parametrize("name", [name for name in USABLE if name != "triton"])
def test_offsets_of_decode_attention_that_do_not_rise(bad, name):
    caches, table = torch.randn(2, 6, 4, 2, 8), torch.zeros(2, 3, dtype=torch.int32)
    with ops.use(name), pytest.raises(ValueError, match="cu_seqlens_q: expected offsets rising"):
        ops.decode_attention(H, *caches, table, CU[:2], cu_seqlens_q=bad)


@pytest.mark.parametrize(("op", "values", "message"), BAD)
def test_argument_errors(op, values, message, on_backend):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*values)


@pytest.mark.parametrize(("op", "values", "message"), BAD_VALUES)
@pytest.mark.parametrize("name", [name for name in USABLE if name != "triton"])
def test_errors_in_values(op, values, message, name):
    with pytest.raises(ValueError, match=message), ops.use(name):
        getattr(ops, op)(*values)


def test_temperature_must_be_positive(on_backend):
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        ops.token_logprob(X, W, IDS, temperature=0.0)


def test_choice_of_backend():
    automatic = backend.resolve(X)
    assert automatic == ("cpu" if "cpu" in USABLE else "reference")
    with ops.use("reference"):
        assert backend.resolve(X) == "reference"
        assert ops.backends()["rope"]["chosen"] == "reference"
        with ops.use(None):
            assert backend.resolve(X) == automatic
        assert backend.resolve(X) == "reference"
    assert backend.resolve(X) == automatic
    assert backend.resolve(torch.empty(1, device="meta")) == "reference"


def test_native_backends_have_every_op():
    pytest.importorskip("triton")
    from llama2rt.ops import cuda_kernels, triton

    assert set(backend.OPS) <= set(cuda_kernels.FUNCTIONS)
    assert set(backend.OPS) <= set(triton.NATIVE)
    if "cpu" in USABLE:
        assert all("cpu" in found["native"] for found in ops.backends("cpu").values())


def test_unusable_backends_say_why():
    unusable = ops.backends("meta")["rms_norm"]["unusable"]
    assert set(unusable) == {"cpu", "triton", "cuda", "flash_attn"} and all(unusable.values())
    for name, reason in ops.backends("cpu")["rms_norm"]["unusable"].items():
        message = f"backend '{name}' .*cannot be used: {re.escape(reason)}"
        with pytest.raises(ValueError, match=message), ops.use(name):
            ops.swiglu(X, X)
    with pytest.raises(ValueError, match="unknown backend 'opencl', expected one of reference"):
        ops.use("opencl")
    assert list(ops.backends("cpu")) == list(backend.OPS)
    if "cpu" in USABLE:
        assert "CUDA" not in ops.backends("cuda")["swiglu"]["unusable"]["cpu"]
        assert "'cuda'" in ops.backends("cuda")["swiglu"]["unusable"]["cpu"]


@pytest.mark.parametrize(
    ("name", "expected"), [("reference", "reference"), ("triton", "tensors|not installed")]
)
def test_environment_variable(name, expected):
    program = (
        "import torch, llama2rt.ops as ops\n"
        "print(ops.backends()['rope']['chosen'])\n"
        "try: ops.swiglu(torch.ones(1, 2), torch.ones(1, 2))\n"
        "except ValueError as error: print(error)\n"
    )
    choice = {"LLAMA2RT_BACKEND": name, "TRITON_INTERPRET": "0"}
    assert re.search(expected, run_python("-c", program, env=choice).stdout)


@pytest.fixture
def ran(monkeypatch):
    """The backends whose functions are asked for, in order."""
    found = []
    original = backend.implementation
    monkeypatch.setattr(
        backend,
        "implementation",
        lambda op, name, dtype: found.append(name) or original(op, name, dtype),
    )
    return found


def test_backward_runs_on_the_backend_of_its_forward(ran):
    x = torch.randn(3, 4, requires_grad=True)
    with ops.use("reference"):
        y = ops.swiglu(x, x)
    y.sum().backward()
    assert ran == ["reference", "reference"]


def test_checkpoint_context_repeats_on_the_forward_backend(ran):
    x = torch.randn(3, 4, requires_grad=True)
    with ops.use("reference"):
        y = torch.utils.checkpoint.checkpoint(
            lambda x: ops.swiglu(x, x), x, use_reentrant=False, context_fn=ops.checkpoint_context
        )
    y.sum().backward()
    assert set(ran) == {"reference"} and len(ran) >= 3


def test_a_negative_bit_is_a_sign():
    """torch keeps the sign of `z.conj().imag` beside the memory, and its exchange with native code
    does not tell of it (findings/dlpack_exchange.sh)."""
    torch.manual_seed(0)
    gate = torch.randn(2, 16, dtype=torch.complex64).conj().imag
    assert gate.is_neg()
    plain = torch.empty(2, 16).copy_(gate)
    up, weight = torch.randn(2, 16), torch.ones(16)
    assert torch.equal(ops.swiglu(gate, up), ops.swiglu(plain, up))
    assert torch.equal(ops.rms_norm(gate, weight, 1e-5), ops.rms_norm(plain, weight, 1e-5))
    targets = torch.tensor([1, 0])
    found, expected = (ops.token_logprob(x, up, targets) for x in (gate, plain))
    assert torch.equal(found, expected)
