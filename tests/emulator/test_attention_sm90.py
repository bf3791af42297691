"""Attention for Hopper, emulated: wgmma, TMA and mbarrier as csrc/emulator/ptx_sm90.cuh has them.

By the rule of `numerics.judge`, and the promises beside it.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import both_directions, check, offsets, sdpa
from numerics import judge, leaves_of, same_bits, wide
from processes import run_python
from strides import heads_first

from llama2rt.ops import cuda_kernels, reference
from llama2rt.ops.cuda_kernels import attention_sm90

pytestmark = pytest.mark.usefixtures("poisoned")

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
RAGGED = [1, 2, 0, 113, 203]
# More tiles than a ring has stages. Forward: tiles of 128 keys, 4 stages of 64 columns or 2 of 128.
# Backward: tiles of 64 queries or keys, 4 stages.
LONG = {64: [5, 600], 128: [5, 400]}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture
def hopper(emulated):
    return SimpleNamespace(
        attention=emulated.attention_sm90, attention_backward=emulated.attention_sm90_backward
    )


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_ragged(hopper, dim, causal, dtype, seed):
    check(hopper, 1, 1, dim, dtype, seed, causal=causal, queries=RAGGED)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 1)])
def test_grouped_queries(hopper, heads, kv_heads, seed):
    check(hopper, heads, kv_heads, 64, torch.bfloat16, seed, queries=[40, 0, 130])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_more_tiles_than_stages(hopper, dim, causal, seed):
    check(hopper, 1, 1, dim, torch.bfloat16, seed, causal=causal, queries=LONG[dim])


@pytest.mark.parametrize("kind", ["small", "tail"])
def test_hard_inputs(hopper, kind, dtype, seed):
    check(hopper, 1, 1, 128, dtype, seed, kind=kind, queries=[70, 150])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_other_lengths_of_keys(hopper, causal, dtype, seed):
    """More keys, fewer keys (rows that see none, tiles that see none), no keys, no queries."""
    queries, keys = [3, 70, 200, 5, 0, 9], [190, 37, 20, 0, 4, 9]
    check(hopper, 2, 1, 64, dtype, seed, causal=causal, queries=queries, keys=keys)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(hopper, scale, seed):
    check(hopper, 1, 1, 64, torch.bfloat16, seed, scale=scale, queries=[2, 40])


def test_tiles_are_found_whatever_the_lengths(hopper, seed):
    """Every row of every document is in exactly one tile: out is written, and written once."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 60, (12,), generator=generator).tolist()
    lengths[::5] = [0] * len(lengths[::5])
    lengths[6:8] = [128, 256]
    check(hopper, 1, 1, 64, torch.bfloat16, seed, queries=lengths)


def test_either_direction_takes_the_results_of_the_sm_80_kernels(emulated, seed):
    for forward, backward in (("attention_sm90", "attention"), ("attention", "attention_sm90")):
        run = SimpleNamespace(
            attention=getattr(emulated, forward),
            attention_backward=getattr(emulated, f"{backward}_backward"),
        )
        check(run, 4, 2, 64, torch.bfloat16, seed, queries=[3, 70, 9], keys=[90, 37, 9])


def test_nothing_to_do(hopper):
    q, k = torch.ones(3, 2, 64).half(), torch.ones(0, 1, 64).half()
    rest = (offsets([3]), offsets([0]), 0, True, 1.0)
    out, lse, dq, dk, dv = both_directions(hopper, q, q, k, k, *rest)
    assert not out.any() and (lse == -torch.inf).all() and not dq.any()
    assert dk.shape == dv.shape == k.shape
    rest = (offsets([0]), offsets([3]), 0, True, 1.0)
    out, lse, dq, dk, dv = both_directions(hopper, q[:0], q[:0], q[:, :1], q[:, :1], *rest)
    assert out.shape == dq.shape == (0, 2, 64) and lse.shape == (2, 0)
    assert dk.shape == (3, 1, 64) and not dk.any() and not dv.any()


@pytest.mark.parametrize("dim", [64, 128])
def test_documents_never_see_each_other(hopper, dim):
    """A tile's tail holds the next document's rows: not even their NaN may come through."""
    cu = offsets([113, 130, 20])
    tensors = torch.randn(4, 263, 1, dim).bfloat16().unbind()
    clean = both_directions(hopper, *tensors, cu, cu, 0, True, 0.1)
    for x in tensors:
        x[113:243] = torch.nan
    for got, expected in zip(
        both_directions(hopper, *tensors, cu, cu, 0, True, 0.1), clean, strict=True
    ):
        got, expected = (x.mT if x.dim() == 2 else x for x in (got, expected))  # lse [H, T]
        assert torch.equal(got[:113], expected[:113]) and torch.equal(got[243:], expected[243:])
        assert got[113:243].isnan().all()


def test_any_strides(hopper):
    """A fused projection's output, transposed ones, shared heads, rows off 16 bytes, and tokens
    apart by no whole number of heads, which the driver's rules for tensor maps leave out."""
    cu = offsets([3, 60])
    fused = torch.randn(63, 10, 64).half()
    tensors = fused.split([4, 4, 1, 1], 1)
    rest = (cu, cu, 0, True, 0.1)
    expected = both_directions(hopper, *(x.contiguous() for x in tensors), *rest)
    off = [torch.empty(x.numel() + 1).half()[1:].view(x.shape).copy_(x) for x in tensors]
    transposed = [heads_first(x) for x in tensors]
    apart = [F.pad(x.flatten(1), (0, 8))[:, :-8].unflatten(1, x.shape[1:]) for x in tensors]
    assert all(x.stride(0) % x.stride(1) == 8 for x in apart)
    for these in (tensors, off, transposed, apart):
        got = both_directions(hopper, *these, *rest)
        assert same_bits(got, expected)
    dout, q, k, v = tensors
    shared = (dout[:, :1].expand(-1, 4, -1), q, k.expand(-1, 2, -1), v.expand(-1, 2, -1))
    got = both_directions(hopper, *shared, *rest)
    expected = both_directions(hopper, *(x.contiguous() for x in shared), *rest)
    assert same_bits(got, expected)


def test_results_of_the_forward_pass_off_16_bytes(hopper):
    cu = offsets([3, 60])
    dout, q, k, v = torch.randn(4, 63, 1, 64).half().unbind()
    rest = (cu, cu, 0, True, 0.1)
    out, lse = hopper.attention(q, k, v, *rest)
    off = torch.empty(out.numel() + 1).half()[1:].view(out.shape).copy_(out)
    results = [hopper.attention_backward(dout, q, k, v, x, lse, *rest) for x in (out, off)]
    assert same_bits(*results)


def test_strides_beyond_32_bits(hopper, far, dtype):
    near = [torch.randn(5, heads, 64).to(dtype) for heads in (2, 2, 1, 1)]
    cu = offsets([1, 4])
    results = [
        both_directions(hopper, *tensors, cu, cu, 0, True, 0.25)
        for tensors in (near, [far(x) for x in near])
    ]
    assert same_bits(*results)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_same_bits_whatever_the_order_of_threads(module, hopper, dim):
    cu = offsets(LONG[dim])
    tensors = torch.randn(4, sum(LONG[dim]), 1, dim).bfloat16().unbind()
    results = []
    for order in range(3):
        module.set_seed(order)
        results.append(both_directions(hopper, *tensors, cu, cu, 0, True, 0.1))
    assert all(same_bits(results[0], other) for other in results[1:])


def sources_of(points):
    """What stands at each 'file:line'."""
    for point in points:
        file, line = point.split(":")
        yield (SOURCES / file).read_text().splitlines()[int(line) - 1].strip()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_barrier_is_needed(module, hopper, direction):
    """Without any one barrier, wait, fence or arrival a result is wrong, or the emulator objects.

    All but one: the two warp groups' turns decide when products run, not what they compute.
    """
    lengths, dim, seeds = [113, *LONG[128]], 128, range(4)
    cu = offsets(lengths)
    dout, q, k, v = torch.randn(4, sum(lengths), 1, dim).bfloat16().unbind()
    rest = (cu, cu, 0, False, dim**-0.5)
    out, lse = hopper.attention(q, k, v, *rest)
    exact = reference.attention(*wide(q, k, v), *rest)
    leaves = leaves_of(q, k, v)
    theirs = sdpa(*leaves, lengths, lengths, False, dim**-0.5)
    if direction == "forward":
        expected, yardstick = [exact[0]], [theirs.detach()]
    else:
        expected = reference.attention_backward(*wide(dout, q, k, v), *exact, *rest)
        yardstick = torch.autograd.grad(theirs, leaves, dout)
    for x in (dout, q, k, v, out):
        x[113:118] = torch.nan  # the second document, which is in the tail of the first
    compared = torch.tensor([*range(113), *range(118, len(q))])

    def run():
        met = set()
        for seed in seeds:
            module.set_seed(seed)
            if direction == "forward":
                ours = hopper.attention(q, k, v, *rest)[:1]
            else:
                ours = hopper.attention_backward(dout, q, k, v, out, lse, *rest)
            met.update(module.sync_points())
            for three in zip(ours, expected, yardstick, strict=True):
                judge(direction, *(x[compared] for x in three), gradient=direction == "backward")
        return met

    points = sorted(run())
    assert len(points) > 15
    unnoticed = []
    for point in points:
        module.leave_out(point)
        try:
            run()
            unnoticed.append(point)
        except (AssertionError, RuntimeError) as error:
            print(f"without {point}: {error}")
        finally:
            module.leave_out("")
    turn = ["barrier_sync(TURN + group, CONSUMER_THREADS);"]
    assert list(sources_of(unnoticed)) == (turn if direction == "forward" else [])


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (80, torch.bfloat16, "head dim of 64 or 128, got 80"),
        (64, torch.float32, "bfloat16 or float16, got torch.float32"),
    ],
)
def test_what_it_cannot_compute_is_an_error(hopper, dim, dtype, message):
    q, cu = torch.ones(4, 1, dim, dtype=dtype), offsets([4])
    rest = (cu, cu, 0, True, 0.1)
    with pytest.raises(ValueError, match=message):
        hopper.attention(q, q, q, *rest)
    with pytest.raises(ValueError, match=message):
        hopper.attention_backward(q, q, q, q, q, torch.ones(1, 4), *rest)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("sm90", "True True"), ("hopper", "expected 'sm90' or nothing, got 'hopper'")],
)
def test_it_is_chosen_by_name_alone(value, expected):
    if not attention_sm90.CHOSEN:
        assert cuda_kernels.FUNCTIONS["attention"] is not attention_sm90.attention
    program = (
        "from llama2rt.ops.cuda_kernels import FUNCTIONS as f, attention_sm90 as sm90;"
        "print(f['attention'] is sm90.attention,"
        " f['attention_backward'] is sm90.attention_backward)"
    )
    done = run_python("-c", program, env={attention_sm90.VARIABLE: value}, status=None)
    assert expected in done.stdout + done.stderr
