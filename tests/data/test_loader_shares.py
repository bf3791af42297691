"""Steps divided among processes: together they hold what one process's step holds."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data import tokens
from llama2rt.data.loader import ExampleLoader, PairLoader, balanced, dealt
from llama2rt.data.packing import Example
from llama2rt.data.token_loader import TokenLoader


def examples(count):
    """Each of its own first token, and of 2 to 31 tokens."""
    lengths = np.random.default_rng(0).integers(1, 31, count)
    return [Example.of([i, *[count] * n]) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def corpus(small_tokenizer, tmp_path_factory):
    texts = [f"{i} the {'lazy fox ' * (i % 7)}jumps" for i in range(40)]
    return tokens.build(texts, small_tokenizer, tmp_path_factory.mktemp("shares") / "a.tokens")


def make(name, corpus, share):
    if name == "examples":
        return ExampleLoader(examples(23), 7, 40, 3, 2, share=share)
    if name == "pairs":
        documents = examples(46)
        pairs = list(zip(documents[::2], documents[1::2], strict=True))
        margin = {"margin": np.arange(23.0)}
        return PairLoader(pairs, margin, 7, 60, 3, 2, share=share)
    return TokenLoader(corpus, 16, 112, 32, 3, 2, share=share)


def held(step):
    """Documents with their targets, and pairs' extras, of micro-batches that count."""
    found = []
    for micro in step:
        if micro.weight:
            batch = getattr(micro, "batch", micro)
            edges = batch.cu_seqlens.tolist()
            for begin, end in itertools.pairwise(edges):
                row = batch.tokens[begin:end].tolist(), batch.targets[begin:end].tolist()
                found.append(row)
            found += getattr(micro, "extras", {}).get("margin", np.zeros(0)).tolist()
    return sorted(map(str, found))


@pytest.mark.parametrize("name", ["examples", "pairs", "tokens"])
@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_divide_the_steps_of_one_process(name, ranks, corpus):
    whole = list(make(name, corpus, (0, 1)))
    shares = zip(*(make(name, corpus, (rank, ranks)) for rank in range(ranks)), strict=True)
    fillers = 0
    for step, parts in zip(whole, shares, strict=True):
        assert held(step) == sorted(row for part in parts for row in held(part))
        assert sum(m.weight for m in step) == sum(m.weight for part in parts for m in part)
        assert len({len(part) for part in parts}) == 1
        fillers += sum(micro.weight == 0 for part in parts for micro in part)
    # Nine ranks have seven items.
    assert fillers or ranks < 9


@pytest.mark.parametrize("name", ["examples", "pairs", "tokens"])
def test_a_run_goes_on_on_another_number_of_ranks(name, corpus):
    whole = make(name, corpus, (0, 1))
    begun = make(name, corpus, (1, 2))
    for _ in range(2):
        whole.next()
        begun.next()
    parts = [make(name, corpus, (rank, 3)) for rank in range(3)]
    for part in parts:
        part.load_state_dict(begun.state_dict())
    together = sorted(row for part in parts for row in held(part.next()))
    assert together == held(whole.next())


def test_a_filler_is_small_and_its_loss_finite():
    filler = make("pairs", None, (8, 9)).next()[-1]
    assert (filler.weight, filler.batch.documents, filler.batch.tokens.numel()) == (0, 2, 4)
    # A mean over a side's targets must not divide by none of them.
    assert filler.batch.targets.tolist() == [0, -1, 0, -1]
    assert filler.extras["margin"].tolist() == [0.0]
    assert filler.to("cpu").weight == 0


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 5))
def test_no_rank_has_more_than_the_longest_beyond_another(lengths, ranks):
    parts = balanced(lengths, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_dealt_to_each_as_many():
    assert [list(dealt("abcde", (rank, 3), "-")) for rank in range(3)] == [
        ["a", "d"],
        ["b", "e"],
        ["c", "-"],
    ]
