"""The emulator itself, on kernels of samples.cu: what it computes and every mistake it reports."""

import emulator
import pytest
import torch


@pytest.fixture(scope="session")
def samples_module():
    if reason := emulator.why_not():
        pytest.skip(reason)
    return emulator.build("_samples")


class Samples:
    """`samples.name(...)` runs a kernel; tensors among the arguments are what it may touch."""

    def __init__(self, module):
        self.module, self.checked = module, emulator.Checked(module)

    def __getattr__(self, name):
        def call(*arguments):
            self.checked.hand_over(arguments)
            return getattr(self.module, name)(
                *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
            )

        return call


@pytest.fixture
def samples(samples_module, seed):
    samples_module.set_seed(seed)
    print(f"emulator seed {seed}")
    return Samples(samples_module)


def order(samples, seed, blocks=1, threads=64):
    samples.module.set_seed(seed)
    turn, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(blocks * threads, dtype=torch.int32)
    samples.order(blocks, threads, turn, seen)
    assert sorted(seen.tolist()) == list(range(blocks * threads))
    return seen.tolist()


def test_the_order_of_threads_comes_from_the_seed(samples):
    assert order(samples, 1) == order(samples, 1)
    assert len({tuple(order(samples, seed)) for seed in range(8)}) == 8
    # A warp runs to its end before the next one: which is first differs, and so do its lanes.
    first_warp = {order(samples, seed).index(0) // 32 for seed in range(16)}
    first_lane = {order(samples, seed).index(0) % 32 for seed in range(16)}
    assert first_warp == {0, 1} and len(first_lane) > 4
    # Launches after one another differ too.
    samples.module.set_seed(5)
    launches = []
    for _ in range(2):
        turn, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        samples.order(1, 64, turn, seen)
        launches.append(seen.tolist())
    assert launches[0] != launches[1]


@pytest.mark.parametrize("os_threads", [1, 2, 5])
def test_atomics_over_blocks(samples, os_threads):
    torch.set_num_threads(os_threads)
    order(samples, 3, blocks=37, threads=96)


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 3, 2), (1, 5, 1)])
@pytest.mark.parametrize("block", [(1, 1, 1), (32, 8, 1), (5, 3, 4), (1024, 1, 1)])
def test_every_thread_runs_once_and_knows_its_place(samples, grid, block):
    threads = block[0] * block[1] * block[2]
    blocks = grid[0] * grid[1] * grid[2]
    seen = torch.zeros(blocks, threads, dtype=torch.int32)
    samples.index(grid, block, seen)
    expected = 1 + 1000 * torch.arange(blocks)[:, None] + torch.arange(threads)
    assert torch.equal(seen, expected.int())


def test_constants_may_be_read(samples):
    y = torch.zeros(32, dtype=torch.int32)
    samples.table(y)
    assert y[:4].tolist() == [2, 3, 5, 7]


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize(
    ("offset", "where"),
    [
        (8, "0 bytes after the end of a buffer of 32 bytes"),
        (-1, "4 bytes before a buffer of 32 bytes"),
        (2**40, r"after the end of a buffer|0x"),
    ],
)
def test_memory_outside_of_every_buffer(samples, offset, where, writes):
    # In the middle of a larger tensor: what surrounds it is there, but was not handed over.
    whole, sink = torch.zeros(24), torch.zeros(1)
    p = whole[8:16]
    samples.touch(p, 7, writes, sink)
    thread = r"kernel touch, block \([01], 0, 0\), thread \(3, 0, 0\)"
    what = rf"{'write' if writes else 'read'} of 4 bytes .*{where}"
    with pytest.raises(RuntimeError, match=rf"{thread}: {what}.*emulator seed \d+"):
        samples.touch(p, offset, writes, sink)
    assert whole.sum() == float(writes)
    samples.touch(p, 0, writes, sink)  # an error leaves nothing behind


def test_unaligned_vectors(samples):
    samples.unaligned(torch.zeros(9)[3:], torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"unaligned access at vec.cuh:\d+"):
        samples.unaligned(torch.zeros(8), torch.zeros(4))


def test_arithmetic_that_has_no_defined_result(samples):
    sink = torch.zeros(1, dtype=torch.int32)
    samples.overflow(46340, sink)
    assert sink == 46340**2
    with pytest.raises(RuntimeError, match=r"signed overflow at samples.cu:\d+"):
        samples.overflow(46341, sink)
    samples.array(3, sink)
    with pytest.raises(RuntimeError, match=r"index outside of an array at samples.cu:\d+"):
        samples.array(4, sink)


@pytest.mark.parametrize("offset", [-1, 4, 40])
def test_shared_memory_that_was_not_asked_for(samples, offset):
    sink = torch.zeros(1)
    samples.shared(16, 3, sink)
    with pytest.raises(RuntimeError, match="read of 4 bytes "):
        samples.shared(16, offset, sink)


def test_uninitialised_memory_is_poison(samples):
    shared, local = torch.zeros(1), torch.zeros(1)
    samples.uninitialised(shared, local)
    assert shared.isnan() and not local.abs() < 1e30


def reverse(samples, threads=96):
    x, y = torch.randn(2, threads), torch.zeros(2, threads)
    samples.reverse(threads, x, y)
    assert torch.equal(y, x.flip(1))


def copy(samples, threads=64, tiles=5):
    packets = threads * tiles
    x, y = torch.randn(packets, 4), torch.full((packets, 4), torch.nan)
    samples.copy(threads, x[: packets - 7], y, tiles, packets - 7)
    assert torch.equal(y[:-7], x[:-7]) and not y[-7:].any()


def warp_barrier(samples):
    y = torch.zeros(2, 32)
    samples.warp_barrier(y)
    assert torch.equal(y, torch.arange(31.0, -1, -1).expand(2, -1))


def named_barriers(samples):
    y = torch.zeros(96)
    samples.named_barriers(y)
    assert torch.equal(y[:32], torch.arange(31.0, -1, -1))
    assert torch.equal(y[32:], torch.arange(127.0, 63, -1))


@pytest.mark.parametrize(
    ("check", "points"), [(reverse, 2), (copy, 4), (warp_barrier, 1), (named_barriers, 3)]
)
def test_what_synchronises_does_and_is_missed_when_left_out(samples, check, points):
    for seed in range(8):
        samples.module.set_seed(seed)
        check(samples)
    met = samples.module.sync_points()
    assert len(met) == points
    for point in met:
        samples.module.leave_out(point)
        try:
            with pytest.raises((AssertionError, RuntimeError)):
                for seed in range(8):
                    samples.module.set_seed(seed)
                    check(samples)
        finally:
            samples.module.leave_out("")


def test_a_thread_that_ends_while_others_wait(samples):
    with pytest.raises(
        RuntimeError,
        match=r"kernel early_exit.*no thread can go on: 63 at barrier 0 for 64 threads, "
        r"samples.cu:\d+, 1 have ended",
    ):
        samples.early_exit()


def test_barriers_in_different_branches(samples):
    with pytest.raises(RuntimeError, match=r"__syncthreads at samples.cu:\d+, while other threads"):
        samples.diverged_barrier()


def test_a_warp_in_two_places(samples):
    with pytest.raises(RuntimeError, match="the warp has diverged"):
        samples.diverged_warp(torch.zeros(32, dtype=torch.int32))


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0, 1, 1), (32, 1, 1), "without threads"),
        ((1, 1, 1), (33, 32, 1), "more than 1024 threads"),
        ((1, 65536, 1), (1, 1, 1), "65535"),
    ],
)
def test_impossible_launches(samples, grid, block, message):
    with pytest.raises(RuntimeError, match=f"index: .*{message}"):
        samples.index(grid, block, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="227 KiB"):
        samples.shared(228 * 1024, 0, torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"more_shared: .* at most 64 bytes .* got 65"):
        samples.more_shared(torch.zeros(1))


def test_lanes_exchange_values(samples):
    y = torch.zeros(9, 32, dtype=torch.int32)
    samples.shuffles(y)
    lane = torch.arange(32, dtype=torch.int32)
    segment = lane % 16
    expected = [
        torch.full_like(lane, 50),
        10 * (lane // 8 * 8 + 1),
        10 * (lane ^ 3),
        10 * torch.where(lane >= 2, lane - 2, lane),
        10 * torch.where(segment + 2 < 16, lane + 2, lane),
        torch.full_like(lane, sum(1 << i for i in range(0, 32, 3))),
        torch.ones_like(lane),
        torch.zeros_like(lane),
        torch.where(lane < 16, lane ^ 1, -(lane ^ 1)),
    ]
    for ours, expect in zip(y, expected, strict=True):
        assert torch.equal(ours, expect)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_product_of_matrices(samples, dtype, transposed):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    given = b.t().contiguous() if transposed else b
    d = torch.zeros(16, 8)
    samples.product(dtype == torch.bfloat16, a, given, transposed, d)
    torch.testing.assert_close(d.double(), 2 * (a.double() @ b.double()), rtol=1e-5, atol=1e-5)


def test_transposed_matrices(samples):
    x, y = torch.arange(256, dtype=torch.int16).view(4, 8, 8), torch.zeros(4, 8, 8).short()
    samples.transpose(x, y)
    assert torch.equal(y, x.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounding_is_that_of_torch(samples, dtype):
    """Every number of the type, the numbers half way between two, and their neighbours."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype).float()
    bits = every.view(torch.int32)
    half_way = bits + (1 << (15 if dtype == torch.bfloat16 else 12))
    floats = torch.cat([(half_way + i).view(torch.float32) for i in (-1, 0, 1)] + [every])
    subnormal = torch.arange(0, 4096) * 2.0**-26
    x = torch.cat((floats, subnormal, -subnormal, torch.tensor([65519.0, 65520.0, 1e30, 3.4e38])))
    y, back = torch.zeros_like(x, dtype=dtype), torch.zeros_like(x)
    samples.round(dtype == torch.bfloat16, x, y, back, x.numel())
    expected = x.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))
    assert torch.equal(back[number], y[number].float()) and back[~number].isnan().all()


def test_exp2_flushes_what_is_subnormal(samples):
    x = torch.tensor([0.0, 1.5, -126.0, -126.5, -140.0, -torch.inf, torch.inf, 128.0])
    y = torch.zeros_like(x)
    samples.exp2(len(x), x, y)
    expected = torch.where(x < -126, 0.0, x.double().exp2().float())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


def test_work_beside_the_threads(samples):
    jobs, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(48, dtype=torch.int32)
    samples.deferred(48, jobs, seen)
    assert (seen == 48).all()
