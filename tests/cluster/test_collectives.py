"""The collective model against published measurements and NCCL's own rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.cluster import collectives, congestion, hardware
from llama2rt.errors import InputError

A100 = hardware.GPUS["a100-80gb"]
KIB, MIB, GIB = 2**10, 2**20, 2**30


def timing(op, size, gpus, fabric=hardware.IB):
    return collectives.time(op, size, A100, fabric, collectives.group(gpus))


def bus_gb_per_s(op, size, gpus):
    seconds = timing(op, size, gpus).seconds
    return size * collectives.bus_factor(op, gpus) / seconds / 1e9


@pytest.mark.parametrize("power", range(22, 34))
def test_eight_a100_from_4_mb_follow_the_published_line(power):
    # superbenchmark's logs: 89 us + S x 1.75 / 229.5 GB/s from 4 MB up.
    size = 2**power
    published = 89e-6 + size * 1.75 / 229.5e9
    assert timing("all_reduce", size, 8, hardware.NVLINK).seconds == pytest.approx(
        published, rel=0.10
    )


def test_a_small_all_reduce_costs_its_launch():
    assert 30e-6 < timing("all_reduce", KIB, 8, hardware.NVLINK).seconds < 40e-6


@pytest.mark.parametrize(
    ("op", "published_gb_per_s"),
    [
        ("all_reduce", 235.3),
        ("all_gather", 223.4),
        ("reduce_scatter", 231.5),
        ("all_to_all", 224.3),
    ],
)
def test_eight_gib_on_one_node(op, published_gb_per_s):
    assert bus_gb_per_s(op, 8 * GIB, 8) == pytest.approx(published_gb_per_s, rel=0.05)


@pytest.mark.parametrize("gpus", [16, 32, 64, 128])
def test_large_all_reduce_over_hdr(gpus):
    # NVIDIA/nccl issue 812: about 192 GB/s on DGX A100 with eight HDR NICs.
    assert 185 < bus_gb_per_s("all_reduce", 8 * GIB, gpus) < 200


@pytest.mark.parametrize("gpus", [16, 64, 256, 2048])
def test_tree_below_and_ring_above_one_crossover(gpus):
    where = collectives.group(gpus)
    best = []
    for power in range(10, 40):
        table = collectives.options("all_reduce", 2**power, A100, hardware.IB, where)
        assert len(table) == 6
        picked = timing("all_reduce", 2**power, gpus)
        fastest = min(table, key=lambda option: option.seconds)
        assert (picked.algorithm, picked.protocol) == (fastest.algorithm, fastest.protocol)
        best.append(picked.algorithm)
    crossover = best.index("ring")
    assert crossover > 0 and set(best[crossover:]) == {"ring"}, best


def test_the_crossover_is_where_the_two_formulas_meet():
    # 64 GPUs on AMD hosts. A tree in Simple takes over first from a ring in LL128: 14 + 112 x 2 +
    # 14 x 4 us against 8.4 + 2 (7 x 4 + 3 x 14) us; a byte costs 2 x 63/64 / 0.92 of the
    # bandwidth on the ring and 2 / 0.92 on the tree. Ring in Simple comes last.
    bandwidth = 8 * 25e9 * 0.975
    ring = (14 + 112 * 2 + 14 * 4) * 1e-6
    tree = (8.4 + 2 * (7 * 4 + 3 * 14)) * 1e-6
    meet = (ring - tree) / ((2 / 0.92 - 2 * 63 / 64 / 0.92) / bandwidth)
    below, above = (timing("all_reduce", round(meet * x), 64) for x in (0.98, 1.02))
    assert (below.algorithm, below.protocol) == ("tree", "Simple")
    assert (above.algorithm, above.protocol) == ("ring", "LL128")
    simple = 1.4 * (8.4 + 112 * 6 + 14 * 14) * 1e-6
    last = (simple - ring) / ((2 * 63 / 64 / 0.92 - 2 * 63 / 64) / bandwidth)
    assert timing("all_reduce", round(last * 0.98), 64).protocol == "LL128"
    assert timing("all_reduce", round(last * 1.02), 64).protocol == "Simple"


def test_latency_of_a_flat_ring_over_the_cluster():
    # Ring, Simple: 255 network hops of 14 us and 1792 steps of 6 us: of order 14 ms.
    table = collectives.options("all_gather", 1, A100, hardware.IB, collectives.group(2048))
    simple = next(option for option in table if option.protocol == "Simple")
    assert simple.seconds == pytest.approx(14.3e-3, rel=0.01)


@given(
    op=st.sampled_from(collectives.OPERATIONS),
    gpus=st.sampled_from([2, 8, 16, 64, 512, 2048]),
    power=st.floats(0, 35),
    more=st.floats(1, 10),
)
def test_more_bytes_never_faster_more_bandwidth_never_slower(op, gpus, power, more):
    size, where = 2**power, collectives.group(gpus)
    base = collectives.time(op, size, A100, hardware.ROCE, where).seconds
    assert collectives.time(op, size * more, A100, hardware.ROCE, where).seconds >= base
    wider = hardware.replace(hardware.ROCE, rate_scale=more)
    assert collectives.time(op, size, A100, wider, where).seconds <= base
    slower = hardware.replace(hardware.ROCE, extra_hop_seconds=more * 1.75e-6)
    assert collectives.time(op, size, A100, slower, where).seconds >= base


def test_bad_groups_are_refused():
    with pytest.raises(InputError, match="multiple of 8, got 12"):
        collectives.group(12)
    with pytest.raises(InputError, match="at least 2"):
        collectives.group(1)
    with pytest.raises(InputError, match="nvlink ends at a node, got 2 nodes"):
        timing("all_reduce", MIB, 16, hardware.NVLINK)


def test_expected_fullest_bin_by_enumeration():
    # Two balls in two bins: 2 with chance 1/2, else 1. Three in two: 3 with 1/4, else 2.
    assert congestion.expected_fullest(2, 2) == pytest.approx(1.5)
    assert congestion.expected_fullest(3, 2) == pytest.approx(2.25)
    assert congestion.expected_fullest(5, 1) == pytest.approx(5)


def test_ecmp_efficiency_agrees_with_monte_carlo():
    import numpy as np

    draw = np.random.default_rng(0).integers(0, 16, (20_000, 64))
    fullest = np.mean([np.bincount(row, minlength=16).max() for row in draw])
    assert congestion.efficiency(4, 16) == pytest.approx(4 / fullest, rel=0.01)


@given(flows=st.integers(1, 16), uplinks=st.integers(4, 48))
def test_queue_pairs_and_uplinks_never_hurt(flows, uplinks):
    base = congestion.efficiency(flows, uplinks)
    assert 0 < base <= 1
    assert congestion.efficiency(2 * flows, uplinks) >= base - 1e-12
    assert congestion.efficiency(flows, uplinks + 4) >= base - 1e-12


def test_untuned_roce_lies_where_reports_have_it():
    assert 0.65 < hardware.ROCE.line_rate_share * hardware.ROCE.collisions < 0.75
    assert hardware.ROCE_LOW.collisions < hardware.ROCE.collisions < hardware.ROCE_HIGH.collisions
