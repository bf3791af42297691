"""Loaders: everything once an epoch, resumed = uninterrupted at every step, any micro-batches."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.data import tokens
from llama2rt.data.loader import ExampleLoader, PairLoader
from llama2rt.data.packing import Example
from llama2rt.data.token_loader import TokenLoader
from llama2rt.errors import InputError


def examples(count, seed=0):
    """Each of its own first token, so that it can be recognised."""
    generator = np.random.default_rng(seed)
    return [Example.of([i, *generator.integers(100, 200, i % 5)]) for i in range(count)]


def firsts(step):
    """The first tokens of a step's documents, in order."""
    return [int(m.tokens[i]) for m in step for i in m.cu_seqlens[:-1]]


def flat(steps):
    """Everything a sequence of steps holds, comparable."""
    return [
        [
            (m.tokens.tolist(), m.positions.tolist(), m.cu_seqlens.tolist(), m.targets.tolist())
            for m in step
        ]
        for step in steps
    ]


@pytest.fixture(scope="module")
def corpus(small_tokenizer, tmp_path_factory):
    texts = [f"{i} the {'lazy fox ' * (i % 7)}jumps" for i in range(40)]
    return tokens.build(texts, small_tokenizer, tmp_path_factory.mktemp("corpus") / "a.tokens")


@pytest.fixture(scope="module")
def other_corpus(small_tokenizer, tmp_path_factory):
    texts = [f"counts {i} sheep" for i in range(15)]
    return tokens.build(texts, small_tokenizer, tmp_path_factory.mktemp("corpus") / "b.tokens")


def make(name, corpus, other_corpus, seed=3, epochs=3):
    if name == "examples":
        return ExampleLoader(examples(23), 5, 20, seed, epochs)
    if name == "pairs":
        pairs = list(zip(examples(23), examples(23, 1), strict=True))
        return PairLoader(pairs, {"margin": np.arange(23.0)}, 4, 20, seed, epochs)
    if name == "tokens":
        return TokenLoader(corpus, 16, 64, 32, seed, epochs)
    return TokenLoader([corpus, other_corpus], 16, 64, 32, seed, epochs, weights=[1, 2])


ALL = ["examples", "pairs", "tokens", "mixture"]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_every_epoch_holds_every_example_once(count, batch_size, epochs, seed):
    loader = ExampleLoader(examples(count), batch_size, 12, seed, epochs)
    for _ in range(epochs):
        steps = [loader.next() for _ in range(loader.steps_per_epoch)]
        seen = [firsts(step) for step in steps]
        assert sorted(i for step in seen for i in step) == list(range(count))
        assert [len(step) for step in seen[:-1]] == [batch_size] * (len(steps) - 1)
    with pytest.raises(StopIteration):
        loader.next()
    with pytest.raises(StopIteration):
        loader.next()


def test_epochs_and_seeds_differ_in_order():
    loader = ExampleLoader(examples(30), 30, 100, seed=0)
    first, second = firsts(loader.next()), firsts(loader.next())
    other = firsts(ExampleLoader(examples(30), 30, 100, seed=1).next())
    assert first != second
    assert first != other
    assert firsts(ExampleLoader(examples(30), 30, 100, seed=0).next()) == first


@pytest.mark.parametrize("name", ALL)
def test_resumed_equals_uninterrupted_at_every_step(name, corpus, other_corpus):
    """The saved state passes through JSON, as in a checkpoint; epoch boundaries are among the
    steps, the end of the last epoch too."""

    def content(steps):
        if name == "pairs":
            margins = [m.extras["margin"].tolist() for step in steps for m in step]
            return margins, flat([[m.batch for m in step] for step in steps])
        return flat(steps)

    loader = make(name, corpus, other_corpus)
    total = 3 * loader.steps_per_epoch
    states, steps = [], []
    for _ in range(total):
        states.append(json.dumps(loader.state_dict()))
        steps.append(loader.next())
    states.append(json.dumps(loader.state_dict()))
    for at, state in enumerate(states):
        resumed = make(name, corpus, other_corpus)
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert content(list(resumed)) == content(steps[at:]), at


@pytest.mark.parametrize("name", ALL)
def test_resuming_mid_run_forgets_what_was_handed_out_before(name, corpus, other_corpus):
    loader = make(name, corpus, other_corpus)
    state = loader.state_dict()
    first = loader.next()
    for _ in range(loader.steps_per_epoch):  # into the next epoch
        loader.next()
    loader.load_state_dict(state)
    again = loader.next()
    unwrap = [(m.batch if name == "pairs" else m) for m in first]
    assert flat([unwrap]) == flat([[(m.batch if name == "pairs" else m) for m in again]])


def test_resuming_on_other_data_is_refused(corpus, other_corpus):
    state = ExampleLoader(examples(23), 5, 20, 3).state_dict()
    changed, masked = examples(23), examples(23)
    changed[7].tokens[1] += 1
    masked[7].trainable[1] = False
    for other in (
        ExampleLoader(examples(22), 5, 20, 3),
        ExampleLoader(examples(23), 4, 20, 3),
        ExampleLoader(examples(23), 5, 20, 4),
        ExampleLoader(changed, 5, 20, 3),
        ExampleLoader(masked, 5, 20, 3),
    ):
        with pytest.raises(InputError, match=r"cannot resume: \w+ was .*, is .* now"):
            other.load_state_dict(state)
    state = TokenLoader(corpus, 16, 64, 32, 3).state_dict()
    for other in (
        TokenLoader(other_corpus, 16, 64, 32, 3),
        TokenLoader(corpus, 8, 64, 32, 3),
        TokenLoader([corpus, other_corpus], 16, 64, 32, 3),
    ):
        with pytest.raises(InputError, match="cannot resume"):
            other.load_state_dict(state)


@pytest.mark.parametrize("name", ["examples", "tokens"])
def test_micro_batches_do_not_change_a_step(name, corpus):
    """1 x 8 = 8 x 1 as far as data goes: the same documents and targets in the same order."""

    def steps(micro_tokens):
        if name == "examples":
            loader = ExampleLoader(examples(23), 8, micro_tokens, 0, 1)
        else:
            loader = TokenLoader(corpus, 16, 128, micro_tokens, 0, 1)
        return list(loader)

    few, many = steps(1000), steps(16)
    assert [len(step) for step in few] == [1] * len(few)
    assert max(len(step) for step in many) > 1
    for one, several in zip(few, many, strict=True):
        for name in ("tokens", "positions", "targets"):
            joined = torch.cat([getattr(m, name) for m in several])
            assert torch.equal(joined, getattr(one[0], name))
        assert sum(m.weight for m in several) == one[0].weight


@pytest.mark.parametrize("context", [4, 16, 10_000])
def test_tokens_are_each_predicted_once_an_epoch(corpus, small_tokenizer, context):
    size = max(context, 32)
    loader = TokenLoader(corpus, context, size, size, seed=1)
    ids = corpus.ids().astype(int)
    expected = Counter(ids[ids != small_tokenizer.bos].tolist())
    previous = None
    for _ in range(3):
        steps = [loader.next() for _ in range(loader.steps_per_epoch)]
        targets = torch.cat([m.targets for step in steps for m in step])
        assert Counter(targets[targets >= 0].tolist()) == expected
        assert sum(len(m.tokens) for step in steps for m in step) == len(ids) - 1
        if context < 10_000:
            assert targets.tolist() != previous
        previous = targets.tolist()


def test_windows_edges_move_between_epochs(corpus):
    """Else the same tokens would always be predicted from the shortest contexts."""
    loader = TokenLoader(corpus, 16, 16, 16, seed=0, epochs=4)
    starts = [
        {
            tuple(m.tokens[:16].tolist())
            for _ in range(loader.steps_per_epoch)
            for m in loader.next()
        }
        for _ in range(4)
    ]
    assert len(set.intersection(*starts)) < len(starts[0]) / 4


def test_documents_in_a_window_do_not_see_each_other(corpus, small_tokenizer):
    for step in TokenLoader(corpus, 32, 96, 96, seed=0, epochs=2):
        for m in step:
            starts = set(m.cu_seqlens[:-1].tolist())
            assert {int(i) for i in torch.nonzero(m.tokens == small_tokenizer.bos)} <= starts
            for a, b in zip(m.cu_seqlens[:-1], m.cu_seqlens[1:], strict=True):
                assert a < b
                assert m.positions[a:b].tolist() == list(range(b - a))
                inner = m.targets[a : b - 1]
                assert torch.equal(inner, m.tokens[a + 1 : b])


def test_mixture_follows_its_weights_without_replacement(corpus, other_corpus):
    weights = [1, 3]
    loader = TokenLoader([corpus, other_corpus], 16, 64, 32, 0, weights=weights)
    windows = loader._windows
    rows = []
    for epoch in range(4):
        loader._epoch = epoch
        rows.append(loader._start_epoch())
    table = np.concatenate(rows)
    drawn = np.bincount(table[:, 0])
    assert drawn.sum() == 4 * sum(windows)
    np.testing.assert_allclose(drawn / drawn.sum(), [0.25, 0.75], atol=0.02)
    # Each file is gone through whole before any of it comes again.
    for index, file in enumerate([corpus, other_corpus]):
        ring = len(file) - 1
        covered = np.zeros(ring, int)
        for _, begin, length in table[table[:, 0] == index].tolist():
            covered[np.arange(begin, begin + length) % ring] += 1
        assert covered.max() - covered.min() <= 1
        assert covered.max() == np.ceil(drawn[index] / windows[index])


def test_unweighted_files_are_each_gone_through_once(corpus, other_corpus, small_tokenizer):
    loader = TokenLoader([corpus, other_corpus], 16, 64, 32, 0, epochs=1)
    targets = torch.cat([m.targets for step in loader for m in step])
    ids = np.concatenate([corpus.ids(), other_corpus.ids()]).astype(int)
    expected = Counter(ids[ids != small_tokenizer.bos].tolist())
    assert Counter(targets[targets >= 0].tolist()) == expected


def test_tiny_files(small_tokenizer, tmp_path):
    tiny = tokens.build(["a"], small_tokenizer, tmp_path / "tiny.tokens")
    loader = TokenLoader(tiny, 512, 4096, 1024, 0, epochs=2)
    assert loader.steps_per_epoch == 1
    assert [sum(m.weight for m in step) for step in loader] == [len(tiny) - 1] * 2


def test_a_step_holds_whole_windows(corpus):
    loader = TokenLoader(corpus, 16, 70, 40, 0, epochs=1)
    first = loader.next()
    assert [len(m.tokens) for m in first] == [32, 32]


def test_pairs_keep_their_extras():
    pairs = list(zip(examples(9), examples(9, 1), strict=True))
    loader = PairLoader(pairs, {"margin": np.arange(9.0)}, 4, 14, 0, 1)
    weights = []
    for step in loader:
        weights.append(sum(m.weight for m in step))
        for m in step:
            assert len(m.batch.tokens) <= 14
            assert firsts([m.batch])[::2] == m.extras["margin"].int().tolist()
    assert weights == [4, 4, 1]


def test_a_pairs_prompt_is_in_its_batch_once():
    sides = [Example.of([1, 5, 6, 7, answer], [False] * 4 + [True]) for answer in (8, 9)]
    (micro,) = PairLoader([(sides[0], sides[1])] * 3, {}, 3, 30, 0, 1).next()
    assert micro.weight == 3 and micro.batch.documents == 6 and micro.batch.weight == 6
    # Neighbours with the same prompt share it too.
    assert micro.batch.tokens.tolist() == [1, 5, 6, 7, 8, 7, 9, 7, 8, 7, 9, 7, 8, 7, 9]


def test_long_examples_pass_alone_and_are_said_once_when_the_loader_is_made(caplog):
    given = [Example.of(range(n)) for n in (1, 30, 2, 40, 20)]
    loader = ExampleLoader(given, 5, 20, 0, epochs=2)
    said = "2 examples longer than micro_tokens, 20, pass alone; the longest has 40 tokens"
    assert [record.message for record in caplog.records] == [said]
    for step in loader:
        assert sum(batch.documents for batch in step) == 5
        sizes = [(len(batch.tokens), batch.documents) for batch in step]
        assert [size for size in sizes if size[0] > 20] in ([(30, 1), (40, 1)], [(40, 1), (30, 1)])
    assert len(caplog.records) == 1

    caplog.clear()
    pairs = [(Example.of(range(n)), Example.of(range(12))) for n in (12, 1, 3)]
    steps = list(PairLoader(pairs, {"margin": np.arange(3.0)}, 3, 20, 0, epochs=1))
    said = "1 pairs longer than micro_tokens, 20, pass alone; the longest has 24 tokens"
    assert [record.message for record in caplog.records] == [said]
    sizes = [(len(m.batch.tokens), m.weight) for step in steps for m in step]
    assert (24, 1) in sizes and all(size <= 20 or weight == 1 for size, weight in sizes)
    assert sum(weight for _, weight in sizes) == 3

    caplog.clear()
    ExampleLoader(given, 5, 40, 0)
    assert not caplog.records


def test_errors_come_when_the_loader_is_made(corpus):
    with pytest.raises(InputError, match="no examples"):
        ExampleLoader([], 4, 20, 0)
    pair = (Example.of(range(12)), Example.of(range(12)))
    with pytest.raises(ValueError, match=r"extras\['margin'\]: expected 1 rows, got 2"):
        PairLoader([pair], {"margin": [1, 2]}, 4, 30, 0)
    with pytest.raises(InputError, match="at least one window of context 64"):
        TokenLoader(corpus, 64, 64, 32, 0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        ExampleLoader([Example.of([1])], 0, 20, 0)
    with pytest.raises(ValueError, match="epochs: expected at least 1 or None, got 0"):
        ExampleLoader([Example.of([1])], 1, 20, 0, 0)
