"""Every op, forward and backward, on each GPU backend, over small ragged shapes.

Small enough for compute-sanitizer, which `make gpu` runs over this file; the numerics rule at real
sizes is the other files' business. Not yet run on a GPU.
"""

import pytest
import torch
from attention_cases import offsets
from numerics import draw

from llama2rt import ops

LENGTHS = (1, 2, 0, 37, 113)
TOKENS, HEADS, KV_HEADS, DIM, WIDTH = sum(LENGTHS), 4, 2, 64, 200


def angles_and_positions():
    angles = torch.rand(TOKENS, DIM // 2, device="cuda")
    return angles.cos(), angles.sin(), torch.arange(TOKENS, device="cuda")


def pages_and_lengths():
    return torch.randperm(12).int().view(3, 4).cuda(), torch.tensor([0, 9, 32]).int().cuda()


# op -> (shapes of the differentiable inputs, the op on them)
CASES = {
    "rms_norm": (
        [(TOKENS, WIDTH), (WIDTH,)],
        lambda x, w: ops.rms_norm(x, w, 1e-5),
    ),
    "add_rms_norm": (
        [(TOKENS, WIDTH), (TOKENS, WIDTH), (WIDTH,)],
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
    ),
    "swiglu": ([(TOKENS, WIDTH), (TOKENS, WIDTH)], ops.swiglu),
    "rope": (
        [(TOKENS, HEADS, DIM), (TOKENS, KV_HEADS, DIM)],
        lambda q, k: ops.rope(q, k, *angles_and_positions()),
    ),
    "attention": (
        [(TOKENS, HEADS, DIM), (TOKENS, KV_HEADS, DIM), (TOKENS, KV_HEADS, DIM)],
        lambda q, k, v: ops.attention(q, k, v, offsets(LENGTHS).cuda()),
    ),
    "token_logprob": (
        [(TOKENS, WIDTH), (301, WIDTH)],
        lambda h, w: ops.token_logprob(h, w, torch.randint(301, (TOKENS,), device="cuda")),
    ),
}


def call(backend, function, inputs, seed):
    """Outputs and gradients of `function` on `backend`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)  # what the case draws is the same for every backend
    with ops.use(backend):
        out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        upstream = [draw(tuple(x.shape), x.dtype, "normal", seed + 7).cuda() for x in outputs]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [*outputs, *gradients]


def agree(ours, reference):
    """Far apart is wrong; how near is right, the numerics rule says elsewhere."""
    for got, want in zip(ours, reference, strict=True):
        assert torch.isfinite(got).all()
        error = (got.double() - want.double()).norm()
        assert error <= 2e-2 * want.double().norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("op", CASES)
def test_an_op_and_its_gradient(backend, op, dtype, seed):
    shapes, function = CASES[op]
    inputs = [draw(shape, dtype, "normal", seed + i).cuda() for i, shape in enumerate(shapes)]
    ours = call(backend, function, inputs, seed)
    torch.cuda.synchronize()
    agree(ours, call("reference", function, inputs, seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_decode_attention(backend, dtype, seed):
    q = draw((3, HEADS, DIM), dtype, "normal", seed).cuda()
    caches = [draw((12, 8, KV_HEADS, DIM), dtype, "normal", seed + i).cuda() for i in (1, 2)]
    table, lengths = pages_and_lengths()
    for cu_q in (None, offsets([2, 0, 1]).cuda()):
        with ops.use(backend):
            ours = ops.decode_attention(q, *caches, table, lengths, cu_seqlens_q=cu_q)
        torch.cuda.synchronize()
        with ops.use("reference"):
            exact = ops.decode_attention(q, *caches, table, lengths, cu_seqlens_q=cu_q)
        agree([ours], [exact])
