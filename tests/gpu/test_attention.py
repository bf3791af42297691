"""attention and decode_attention in Triton and in flash-attn, where that is installed, on a GPU in
bf16, by the rule of `numerics.judge`.

Yardstick: the reference's formulation in bf16 products, one document at a time (torch's math SDPA).
Not yet run on a GPU.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import judge

from llama2rt.ops import reference

LENGTHS = [1, 2, 0, 113, 203, 1024]


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty returns NaN, so an unwritten element is seen."""
    if not torch.cuda.is_available():
        pytest.skip(f"no usable NVIDIA GPU (torch {torch.__version__})")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["triton", "flash_attn"])
def kernels(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def normal(*shape):
    return torch.randn(shape, device="cuda").bfloat16()


def sdpa(q, k, v, bounds, causal):
    parts = []
    for start, end in itertools.pairwise(bounds):
        one, two, three = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                one, two, three, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (52, 52)])
def test_attention(heads, kv_heads, dim, causal, kernels):
    bounds = [0, *itertools.accumulate(LENGTHS)]
    cu = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    q, dout = normal(bounds[-1], heads, dim), normal(bounds[-1], heads, dim)
    k, v = normal(bounds[-1], kv_heads, dim), normal(bounds[-1], kv_heads, dim)
    rest = (cu, cu, max(LENGTHS), causal, dim**-0.5)
    out, lse = kernels.attention(q, k, v, *rest)
    wide = [x.double() for x in (dout, q, k, v)]
    exact, exact_lse = reference.attention(*wide[1:], *rest)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = sdpa(*leaves, [b for b, _ in itertools.groupby(bounds)], causal)
    judge("out", out, exact, theirs.detach())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    ours = kernels.attention_backward(dout, q, k, v, out, lse, *rest)
    expected = reference.attention_backward(*wide, exact, exact_lse, *rest)
    yardstick = torch.autograd.grad(theirs, leaves, dout)
    for name, *three in zip(("dq", "dk", "dv"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)
    again = kernels.attention_backward(dout, q, k, v, out, lse, *rest)
    assert all(torch.equal(*pair) for pair in zip(ours, again, strict=True))


@pytest.mark.parametrize("page", [16, 7, 256])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (64, 1)])
def test_decode_attention(heads, kv_heads, dim, page, kernels):
    lengths = torch.tensor([1, 0, 113, 4096, 16, 1000], dtype=torch.int32, device="cuda")
    most = -(-4096 // page)
    k, v = normal(2, 6 * most, page, kv_heads, dim).unbind()
    q = normal(6, heads, dim)
    table = torch.randperm(6 * most, device="cuda").view(6, most).int()
    arguments = (q, k, v, table, lengths, dim**-0.5)
    out = kernels.decode_attention(*arguments)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), *arguments[3:])
    rows = []
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // page)].long()
        one, two = (x[pages].flatten(0, 1)[:length] for x in (k, v))
        if length:
            rows.append(sdpa(q[row, None], one, two, [0, length], False)[0])
        else:
            rows.append(torch.zeros_like(q[row]))
    judge("out", out, exact, torch.stack(rows))
    assert torch.equal(out, kernels.decode_attention(*arguments))
