"""Shares: honoured to the record, the same for a seed, or refused with what could be filled."""

import pytest

from llama2rt.data import mixture
from llama2rt.data.mixture import Account, draw, pools, wanted
from llama2rt.data.sources import MixSource
from llama2rt.errors import InputError


def sources(*said):
    """A source for each (share, pool)."""
    return [MixSource(path=f"{i}", share=share, pool=pool) for i, (share, pool) in enumerate(said)]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([(None, None), (None, "p")], "pool of 1: give the pool's share"),
        ([(None, None), (0.2, "p"), (0.3, "p")], "pool p: its sources give different shares, 0.2"),
        ([(None, None), (0.5, None), (0.5, None)], "shares add up to 1 and leave nothing"),
        ([(0.5, None), (0.3, None)], "shares add up to 0.8, and no source is without one"),
        ([(0.7, None), (0.7, None)], "shares add up to 1.4"),
    ],
)  # fmt: skip
def test_shares_that_contradict_each_other(said, reason):
    with pytest.raises(ValueError, match=reason):
        pools(sources(*said))


def test_pools_are_drawn_from_as_one():
    found = pools(sources((None, None), (0.25, "p"), (0.25, None), (0.25, "p")))
    assert [(p.name, p.share, p.members) for p in found] == [("p", 0.25, (1, 3)), ("2", 0.25, (2,))]
    assert wanted(found, [30, 25], whole=50) == [25, 25]
    with pytest.raises(
        InputError, match=r"p holds 20 records, and a share of 0.25 needs 25; at most"
    ):
        wanted(found, [20, 25], whole=50)
    with pytest.raises(InputError, match="not one record"):
        wanted(pools(sources((None, None), (0.001, None))), [20], whole=50)


def test_the_share_that_can_be_filled_can():
    """What the refusal names is accepted, and a little more is not."""
    with pytest.raises(InputError) as refused:
        wanted(pools(sources((None, None), (0.5, None), (0.2, None))), [31, 99], whole=70)
    named = float(str(refused.value).split("at most ")[1].split()[0])
    found = pools(sources((None, None), (named, None), (0.2, None)))
    assert wanted(found, [31, 99], whole=70)[0] == 31
    with pytest.raises(InputError):
        found = pools(sources((None, None), (named + 0.02, None), (0.2, None)))
        wanted(found, [31, 99], whole=70)


def test_where_all_have_shares_the_scarcest_goes_in_whole():
    found = pools(sources((0.6, None), (0.3, None), (0.1, None)))
    assert wanted(found, [1000, 90, 1000], whole=0) == [180, 90, 30]
    assert wanted(found, [6, 7, 7], whole=0) == [6, 3, 1]


def test_a_draw_is_the_seeds():
    assert draw(1000, 10, 1, 0) == draw(1000, 10, 1, 0) == sorted(draw(1000, 10, 1, 0))
    assert draw(1000, 10, 1, 0) != draw(1000, 10, 2, 0) != draw(1000, 10, 2, 1)
    counts = [sum(i in draw(20, 10, seed, 0) for seed in range(400)) for i in range(20)]
    assert all(140 < count < 260 for count in counts)  # half of 400, six standard deviations


def test_the_account_says_what_became_of_every_record():
    records = [[[f"{name}{i}"] for i in range(n)] for name, n in (("a", 6), ("b", 10))]
    given = sources((None, None), (0.4, None))
    account = Account()
    for index, (source, found) in enumerate(zip(given, records, strict=True)):
        account.add(f"sources.{index}", source, found, removed=index)
    mixed = mixture.mix(given, records, 3, account)
    assert mixed[:6] == records[0] and len(mixed) == 10
    account.leave_out("too long", mixed[:1])
    account.use(mixed[1:])
    assert account.report() == {
        "composition": [
            {"key": "sources.0", "path": "0", "read": 6, "left_out": {"too long": 1}, "used": 5},
            {"key": "sources.1", "path": "1", "share": 0.4, "read": 11, "used": 4,
             "left_out": {"filtered": 1, "not drawn": 6}},
        ]
    }  # fmt: skip
    assert account.lines() == [
        "sources.0: 5 of 6 records of 0, 55.6% of what is trained on (1 too long)",
        "sources.1: 4 of 11 records of 1, 44.4% of what is trained on (1 filtered, 6 not drawn)",
    ]
    assert Account().report() == {}


def test_a_mix_comes_back_from_toml_and_from_an_option():
    source = MixSource(path="a b.jsonl", share=0.1, pool="p", kind="safety")
    assert MixSource.parse(source.as_option()) == source
    assert MixSource.model_validate(source.model_dump(mode="json")) == source
    assert mixture.declared([MixSource(path="x"), source]) == [
        "sources.0: all of x",
        "sources.1: a share of 0.1 of pool p from a b.jsonl",
    ]
