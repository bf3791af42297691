"""Attention forward for Hopper, emulated: wgmma, TMA and mbarrier as csrc/emulator/ptx_sm90.cuh has
them. By the rule of `numerics.judge`, and the promises beside it.

Yardstick in the same dtype: torch's SDPA in its math form, one document at a time.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
import torch.nn.functional as F
from numerics import draw, judge

from llama2rt.ops import cuda_kernels, reference
from llama2rt.ops.cuda_kernels import attention, attention_sm90

pytestmark = pytest.mark.usefixtures("poisoned")

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "attention_sm90.cu"
RAGGED = [1, 2, 0, 113, 203]
# More tiles of 128 keys than a ring has stages: 4 of 64 columns, 2 of 128.
LONG = {64: [5, 600], 128: [5, 400]}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture
def on(module, seed):
    """The emulator as a Device; the order of threads and units comes from SEED."""
    module.set_seed(seed)
    print(f"emulator seed {seed}")  # shown when the test fails
    return emulator.Emulated(module)


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def sdpa(q, k, v, queries, keys, causal, scale):
    parts = []
    for one, two, three in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        one, two, three = (x.transpose(0, 1)[None] for x in (one, two, three))
        seen = torch.ones(one.shape[2], two.shape[2], dtype=torch.bool)
        if causal:
            seen = seen.tril(two.shape[2] - one.shape[2])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                one, two, three, attn_mask=seen, scale=scale, enable_gqa=True
            )
        parts.append(out[0].transpose(0, 1).nan_to_num(0.0))  # rows that see no key
    return torch.cat(parts)


def check(
    on,
    dim,
    dtype,
    seed,
    *,
    heads=1,
    kv_heads=1,
    kind="normal",
    causal=True,
    queries,
    keys=None,
    scale=None,
):
    keys = queries if keys is None else keys
    scale = dim**-0.5 if scale is None else scale
    q = draw((sum(queries), heads, dim), dtype, kind, seed)
    k = draw((sum(keys), kv_heads, dim), dtype, "normal", seed + 1)
    v = draw((sum(keys), kv_heads, dim), dtype, kind, seed + 2)
    before = [x.clone() for x in (q, k, v)]
    rest = (offsets(queries), offsets(keys, torch.int64), 0, causal, scale)
    out, lse = attention_sm90.attention(on, q, k, v, *rest)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), *rest)
    judge("out", out, exact, sdpa(q, k, v, queries, keys, causal, scale))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_ragged(on, dim, causal, dtype, seed):
    check(on, dim, dtype, seed, causal=causal, queries=RAGGED)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 1)])
def test_grouped_queries(on, heads, kv_heads, seed):
    check(on, 64, torch.bfloat16, seed, heads=heads, kv_heads=kv_heads, queries=[40, 0, 130])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_more_tiles_than_stages(on, dim, causal, seed):
    check(on, dim, torch.bfloat16, seed, causal=causal, queries=LONG[dim])


def test_backward_takes_its_results(on, seed):
    """The deterministic backward pass of the sm_80 kernels, after this forward pass."""
    queries, keys = [3, 70, 9], [90, 37, 9]
    shapes = (sum(queries), 4, 64), (sum(queries), 4, 64), (sum(keys), 2, 64), (sum(keys), 2, 64)
    dout, q, k, v = (draw(s, torch.bfloat16, "normal", seed + i) for i, s in enumerate(shapes))
    rest = (offsets(queries), offsets(keys), 0, True, 0.125)
    out, lse = attention_sm90.attention(on, q, k, v, *rest)
    ours = attention.attention_backward(on, dout, q, k, v, out, lse, *rest)
    wide = [x.double() for x in (dout, q, k, v)]
    expected = reference.attention_backward(*wide, *reference.attention(*wide[1:], *rest), *rest)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = sdpa(*leaves, queries, keys, True, 0.125)
    # A row that sees no key gives plain torch NaN gradients, which are 0.
    yardstick = [x.nan_to_num(0.0) for x in torch.autograd.grad(theirs, leaves, dout)]
    for name, *three in zip(("dq", "dk", "dv"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)


@pytest.mark.parametrize("kind", ["small", "tail"])
def test_hard_inputs(on, kind, dtype, seed):
    check(on, 128, dtype, seed, kind=kind, queries=[70, 150])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(on, causal, dtype, seed):
    """More keys, fewer keys (rows that see none, tiles that see none), no keys, no queries."""
    queries, keys = [3, 70, 200, 5, 0, 9], [190, 37, 20, 0, 4, 9]
    check(on, 64, dtype, seed, causal=causal, queries=queries, keys=keys)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(on, scale, seed):
    check(on, 64, torch.bfloat16, seed, scale=scale, queries=[2, 40])


def test_tiles_are_found_whatever_the_lengths(on, seed):
    """Every row of every document is in exactly one tile: out is written, and written once."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 60, (12,), generator=generator).tolist()
    lengths[::5] = [0] * len(lengths[::5])
    lengths[6:8] = [128, 256]
    check(on, 64, torch.bfloat16, seed, queries=lengths)


def test_nothing_to_do(on):
    q, k = torch.ones(3, 2, 64).half(), torch.ones(0, 1, 64).half()
    out, lse = attention_sm90.attention(on, q, k, k, offsets([3]), offsets([0]), 0, True, 1.0)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = attention_sm90.attention(on, q[:0], k, k, offsets([0]), offsets([0]), 0, True, 1.0)
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0)


@pytest.mark.parametrize("dim", [64, 128])
def test_documents_never_see_each_other(on, dim):
    """A tile's tail holds the next document's rows: not even their NaN may come through."""
    cu = offsets([113, 130, 20])
    q, k, v = torch.randn(3, 263, 1, dim).bfloat16().unbind()
    clean, _ = attention_sm90.attention(on, q, k, v, cu, cu, 0, True, 0.1)
    for x in (q, k, v):
        x[113:243] = torch.nan
    out, _ = attention_sm90.attention(on, q, k, v, cu, cu, 0, True, 0.1)
    assert torch.equal(out[:113], clean[:113]) and torch.equal(out[243:], clean[243:])
    assert out[113:243].isnan().all()


def test_any_strides(on):
    """A fused projection's output, transposed tensors, and addresses that are not aligned."""
    cu = offsets([3, 60])
    q, k, v = torch.randn(63, 6, 64).half().split([4, 1, 1], 1)
    contiguous = attention_sm90.attention(
        on, *(x.contiguous() for x in (q, k, v)), cu, cu, 0, True, 0.1
    )
    odd = torch.empty(63 * 4 * 64 + 1).half()[1:].view(63, 4, 64).copy_(q)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    shared = [q, k[:, :1].expand(63, 2, 64), v.expand(63, 2, 64)]
    for tensors in ([q, k, v], [odd, k, v], transposed, shared):
        out, lse = attention_sm90.attention(on, *tensors, cu, cu, 0, True, 0.1)
        assert torch.equal(out, contiguous[0]) and torch.equal(lse, contiguous[1])


@pytest.mark.parametrize("dim", [64, 128])
def test_repeatable_in_any_order(module, on, dim):
    cu = offsets(LONG[dim])
    q, k, v = torch.randn(3, sum(LONG[dim]), 1, dim).bfloat16().unbind()
    results = []
    for seed in range(4):
        module.set_seed(seed)
        results.append(attention_sm90.attention(on, q, k, v, cu, cu, 0, True, 0.1))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_every_barrier_is_needed(module, on, dim):
    """Without any one barrier, wait or fence the result is wrong, or the emulator objects.

    All but one: the two warp groups' turns decide when products run, not what they compute.
    """
    cu = offsets([113, *LONG[dim]])
    q, k, v = torch.randn(3, 113 + sum(LONG[dim]), 1, dim).bfloat16().unbind()
    arguments = (cu, cu, 0, False, dim**-0.5)
    exact, _ = reference.attention(q.double(), k.double(), v.double(), *arguments)
    yardstick, _ = reference.attention(q, k, v, *arguments)
    for x in (q, k, v):
        x[113:118] = torch.nan  # the second document, which is in the tail of the first
    compared = torch.tensor([*range(113), *range(118, len(q))])

    def run():
        met = set()
        for seed in range(4):
            module.set_seed(seed)
            out, _ = attention_sm90.attention(on, q, k, v, *arguments)
            judge("out", out[compared], exact[compared], yardstick[compared])
            met.update(module.sync_points())
        return met

    unnoticed = []
    for point in sorted(run()):
        module.leave_out(point)
        try:
            run()
            unnoticed.append(SOURCE.read_text().splitlines()[int(point.split(":")[1]) - 1].strip())
        except (AssertionError, RuntimeError) as error:
            print(f"without {point}: {error}")
        finally:
            module.leave_out("")
    assert unnoticed == ["barrier_sync(TURN + group, 2 * GROUP_THREADS);"]


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (80, torch.bfloat16, "head dim of 64 or 128, got 80"),
        (64, torch.float32, "bfloat16 or float16, got torch.float32"),
    ],
)
def test_what_it_cannot_compute_is_an_error(on, dim, dtype, message):
    q, cu = torch.ones(4, 1, dim, dtype=dtype), offsets([4])
    with pytest.raises(ValueError, match=message):
        attention_sm90.attention(on, q, q, q, cu, cu, 0, True, 0.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("sm90", "True"), ("hopper", "expected 'sm90' or nothing, got 'hopper'")],
)
def test_it_is_chosen_by_name_alone(value, expected):
    if not attention_sm90.CHOSEN:
        assert cuda_kernels.FUNCTIONS.get("attention") is not attention_sm90.attention
    program = (
        "from llama2rt.ops import cuda_kernels as kernels;"
        "print(kernels.FUNCTIONS['attention'] is kernels.attention_sm90.attention)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {attention_sm90.VARIABLE: value},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr
