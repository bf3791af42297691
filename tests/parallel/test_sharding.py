"""Every DTensor rule against the op on whole tensors, forward and gradients."""

import pytest
from sharded_ops import FIRST, SECOND, SEVERAL_QUERIES, WHOLE
from torch.distributed.tensor import Shard

ROWS = {"x": FIRST, "residual": FIRST, "gate": FIRST, "up": FIRST, "positions": FIRST}
HEADS = {"q": SECOND, "k": SECOND, "v": SECOND}

# (op, placements of its arguments, placement of its results): what passes without talking.
TAKEN = [
    *((op, {}, WHOLE) for op in ("rms_norm", "add_rms_norm", "swiglu", "rope", "attention")),
    ("decode_attention", {}, WHOLE),
    ("rms_norm", {"x": FIRST}, FIRST),
    ("add_rms_norm", {"x": FIRST, "residual": FIRST}, FIRST),
    ("swiglu", {"gate": FIRST, "up": FIRST}, FIRST),
    ("swiglu", {"gate": SECOND, "up": SECOND}, SECOND),
    ("rope", {"q": SECOND, "k": SECOND}, SECOND),
    ("rope", {"q": FIRST, "k": FIRST, "positions": FIRST}, FIRST),
    ("attention", {"q": SECOND, "k": SECOND, "v": SECOND}, SECOND),
    ("decode_attention", {"q": SECOND, "k_cache": Shard(2), "v_cache": Shard(2)}, SECOND),
    ("decode_attention", {"q": FIRST, "block_table": FIRST, "lengths": FIRST}, FIRST),
    (SEVERAL_QUERIES, {}, WHOLE),
    (SEVERAL_QUERIES, {"q": SECOND, "k_cache": Shard(2), "v_cache": Shard(2)}, SECOND),
]
# Placements that an op cannot take: torch gathers or cuts to what it takes.
GATHERED = [
    ("rms_norm", {"x": SECOND, "weight": FIRST}),
    ("add_rms_norm", {"x": FIRST, "residual": SECOND}),
    ("swiglu", {"gate": FIRST, "up": SECOND}),
    ("rope", {"q": Shard(2), "k": SECOND}),
    ("attention", {"q": FIRST, "k": FIRST, "v": SECOND}),
    ("decode_attention", {"q": Shard(2), "k_cache": FIRST}),
    (SEVERAL_QUERIES, {"q": FIRST, "block_table": FIRST, "lengths": FIRST}),
]


@pytest.fixture(scope="module")
def results(on_ranks):
    """Every case in one call on the ranks."""
    from sharded_ops import rules

    cases = [(op, given) for op, given, *_ in [*TAKEN, *GATHERED]]
    return [
        dict(zip(range(len(cases)), of_rank, strict=True)) for of_rank in on_ranks(2, rules, cases)
    ]


@pytest.mark.parametrize("number", range(len(TAKEN) + len(GATHERED)))
def test_a_rule_gives_what_whole_tensors_give(results, number):
    for of_rank in results:
        distances = of_rank[number]["distances"]
        assert distances and max(distances.values()) < 2e-6, distances


@pytest.mark.parametrize("number", range(len(TAKEN)))
def test_what_an_op_takes_stays_as_it_is_cut(results, number):
    for of_rank in results:
        assert all(p == (TAKEN[number][2],) for p in of_rank[number]["placements"])
        assert of_rank[number]["sent"] == 0
