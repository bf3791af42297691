"""Continuous batching on its own: a fake model that is a function of the cache's content.

The cache here holds token ids, written through `slots`, copied through `copies` and read through
`block_table`, so a page that is shared, moved or freed wrongly changes what a sequence generates.
"""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt.generate.batch import layout
from llama2rt.generate.budget import PREFILL_TOKENS, Budget
from llama2rt.generate.kv_cache import PagePool
from llama2rt.generate.prefix import PrefixCache
from llama2rt.generate.request import Request, SamplingOptions
from llama2rt.generate.sampling import Choice, stream_keys
from llama2rt.generate.scheduler import Scheduler
from llama2rt.generate.speculate import look_up

EOS = 2


def _next_token(context, key):
    value = 0
    for token in (*context, int(key) % 1009):
        value = (value * 31 + token + 1) % 10_007
    return value % 17  # EOS now and then


class FakeModel:
    """Runs a scheduler's steps; checks each of them."""

    def __init__(self, scheduler, pages, page_size, max_sequences):
        self.scheduler, self.page_size, self.most = scheduler, page_size, max_sequences
        self.cache = np.full(pages * page_size, -1)
        self.pages = pages
        self.statistics = {"prefilled": 0, "largest": 0, "steps": 0, "widest": 0}

    def advance(self):
        """One step: the sequences that it finished."""
        scheduler, page_size = self.scheduler, self.page_size
        step = scheduler.step()
        batch = layout(step, scheduler.slots)
        assert len(step.rows) <= self.most
        assert len(batch.tokens) or batch.copies.size or scheduler.rows.size  # no idle step
        assert len(np.unique(batch.slots)) == len(batch.slots) == len(batch.tokens)
        self.cache[batch.slots] = batch.tokens
        blocks = self.cache.reshape(-1, page_size)
        behind = int(batch.cu_seqlens[-1])  # tokens of whole prompts
        offsets = batch.cu_seqlens_q
        if offsets is None:
            offsets = np.arange(len(batch.lengths) + 1)
        assert behind + offsets[-1] == len(batch.tokens)
        contexts = []
        for i, (table, length) in enumerate(zip(batch.block_table, batch.lengths, strict=True)):
            context = blocks[table].ravel()[:length].tolist()
            begin, end = offsets[i], offsets[i + 1]
            expected = np.arange(length - (end - begin), length)
            assert np.array_equal(batch.positions[behind + begin : behind + end], expected)
            contexts += [context[: position + 1] for position in expected]
        keys = scheduler.slots.keys[batch.drawn]
        drawn = contexts[len(contexts) - len(keys) :]
        sampled = np.array(
            [_next_token(context, key) for context, key in zip(drawn, keys, strict=True)], np.int64
        )
        blocks[batch.copies[1]] = blocks[batch.copies[0]]
        prefilled = len(batch.tokens) - len(keys)
        self.statistics["prefilled"] += prefilled
        self.statistics["largest"] = max(self.statistics["largest"], prefilled)
        self.statistics["steps"] += 1
        self.statistics["widest"] = max(self.statistics["widest"], len(step.rows))
        return scheduler.record(step, Choice(sampled, -sampled.astype(np.float32), []))


def _run(prompts, limits, n=1, *, pages, page_size=4, max_sequences=3, eos=EOS, **options):
    budget = Budget(pages, options.pop("prefill_tokens", PREFILL_TOKENS), max_sequences)
    longest = max((len(p) + limit for p, limit in zip(prompts, limits, strict=True)), default=0)
    scheduler = Scheduler(budget, page_size, longest, **options)
    pairs = [(p, s) for p in range(len(prompts)) for s in range(n)]
    keys = stream_keys(0, *np.array(pairs).T)
    for i, ((p, _), key) in enumerate(zip(pairs, keys, strict=True)):
        scheduler.add(Request(i, prompts[p], SamplingOptions(), key, int(limits[p]), (eos,)))
    model = FakeModel(scheduler, pages, page_size, max_sequences)
    finished = {}
    while scheduler.unfinished:
        for sequence in model.advance():
            finished[pairs[sequence.request.id]] = sequence
    assert scheduler.pool.free == pages, "pages leaked"
    assert sorted(finished) == pairs
    return finished, model.statistics


def _alone(prompt, limit, key):
    context, tokens = prompt.tolist(), []
    while len(tokens) < limit and (not tokens or tokens[-1] != EOS):
        tokens.append(_next_token(context + tokens, key))
    return tokens


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=6),
    n=st.integers(1, 5),
    max_tokens=st.integers(1, 20),
    page_size=st.integers(1, 5),
    max_sequences=st.integers(1, 7),
    spare=st.integers(0, 12),
    data=st.data(),
)
def test_every_sample_as_if_alone(lengths, n, max_tokens, page_size, max_sequences, spare, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    prompts = [rng.integers(3, 17, size).astype(np.int32) for size in lengths]
    limits = rng.integers(1, max_tokens + 1, len(lengths)).astype(np.int32)
    # From the least memory that is legal upwards: preemption, dropped prompts, delayed admission.
    longest = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
    pages = -(-int(longest) // page_size) + spare
    finished, _ = _run(
        prompts, limits, n, pages=pages, page_size=page_size, max_sequences=max_sequences
    )
    for (p, s), sequence in finished.items():
        key = stream_keys(0, np.array([p]), np.array([s]))[0]
        tokens = _alone(prompts[p], limits[p], key)
        assert sequence.tokens.tolist() == tokens
        assert sequence.logprobs.tolist() == [-t for t in tokens]
        assert sequence.finish_reason == ("stop" if tokens[-1] == EOS else "length")


def test_samples_share_their_prompt():
    prompts = [np.arange(3, 3 + size, dtype=np.int32) for size in (14, 9)]
    limits = np.array([5, 5], np.int32)
    _, statistics = _run(prompts, limits, 8, pages=200, max_sequences=16)
    assert statistics["prefilled"] == 13 + 8  # each prompt once, up to its last token
    assert statistics["widest"] == 16
    _, statistics = _run(prompts, limits, 8, pages=200, max_sequences=3)
    assert statistics["prefilled"] == 13 + 8  # also when its samples enter one by one


def test_memory_is_shared_too():
    prompt = [np.arange(3, 16, dtype=np.int32) % 13 + 3]  # 12 cached: three full pages of 4
    _, statistics = _run(prompt, np.array([4], np.int32), 4, pages=3 + 4, max_sequences=4)
    assert statistics["widest"] == 4


def test_preempted_sequences_are_recomputed_in_their_turn():
    prompts = [np.full(5, 3 + i, np.int32) for i in range(8)]
    limits = np.full(8, 30, np.int32)
    _, roomy = _run(prompts, limits, pages=100, max_sequences=4, eos=-1)
    finished, tight = _run(prompts, limits, pages=12, max_sequences=4, eos=-1)
    assert roomy["prefilled"] == 32
    assert tight["prefilled"] > 32
    assert tight["widest"] > 1
    assert list(finished) == sorted(finished), "first come, first served"


def test_newcomers_leave_room_to_grow():
    # Without the margin each newcomer would be sent back, and prefilled again, within a page.
    prompts = [np.full(9, 3 + i, np.int32) for i in range(12)]
    _, statistics = _run(prompts, np.full(12, 8, np.int32), pages=13, max_sequences=12, eos=-1)
    assert statistics["prefilled"] == 12 * 8


def test_prefill_of_a_step_is_bounded():
    sizes = (3000, 1000, 200, 6000, 10)
    prompts = [np.full(size, 3 + i, np.int32) for i, size in enumerate(sizes)]
    _, statistics = _run(prompts, np.full(5, 2, np.int32), pages=3000, max_sequences=5)
    assert statistics["largest"] == 4096  # a longer one in chunks
    assert statistics["prefilled"] == 10210 - 5
    assert statistics["steps"] >= 4


def test_finished_sequences_leave_at_once():
    prompts = [np.array([5], np.int32)] * 6
    limits = np.array([1, 9, 1, 1, 1, 1], np.int32)
    _, statistics = _run(prompts, limits, pages=40, max_sequences=2)
    assert statistics["steps"] <= 11  # the long one's nine and the entering steps, not 6 in turn


def test_pages_are_counted():
    pool = PagePool(4)
    a = pool.take(3)
    pool.share(a[:2])
    pool.release(a)
    assert pool.free == 2
    pool.release(a[:2])
    assert pool.free == 4
    with pytest.raises(AssertionError, match="5 pages taken, 4 free"):
        pool.take(5)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(1, 9), st.integers(1, 16)),
        min_size=1,
        max_size=12,
    ),
    page_size=st.integers(1, 4),
    spare=st.integers(0, 9),
    chunk=st.integers(1, 9),
    speculate=st.integers(0, 3),
    keep_answers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_requests_come_and_go(asked, page_size, spare, chunk, speculate, keep_answers, seed):
    """Prompts that begin alike, in chunks, while others decode behind guesses and are aborted."""
    rng = np.random.default_rng(seed)
    openings = rng.integers(3, 6, (3, 12))
    prompts = [
        np.append(openings[which, :shared], rng.integers(3, 9, own)).astype(np.int32)
        for which, shared, own, _ in asked
    ]
    limits = [limit for *_, limit in asked]
    longest = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
    budget = Budget(-(-longest // page_size) + spare, chunk, 4)
    keys = stream_keys(0, np.arange(len(asked)), np.zeros(len(asked), np.int64))
    finished, todo, steps = {}, list(range(len(asked))), 0
    with mock.patch("llama2rt.generate.prefix.LEAST_TOKENS", 1):
        scheduler = Scheduler(
            budget, page_size, longest, speculate=speculate, keep_answers=keep_answers
        )
        model = FakeModel(scheduler, budget.pages, page_size, 4)
        while todo or scheduler.unfinished:
            for _ in range(min(len(todo), rng.integers(4))):
                i = todo.pop(0)
                request = Request(i, prompts[i], SamplingOptions(), keys[i], limits[i], (EOS,))
                scheduler.add(request)
            if rng.random() < 0.15:
                i = int(rng.integers(len(asked)))
                sequence = scheduler.abort(i)
                assert (sequence is None) == (i in todo or i in finished)
                if sequence is not None:
                    finished[i] = sequence
            if rng.random() < 0.06:
                scheduler.reset()
            if scheduler.unfinished:
                for sequence in model.advance():
                    finished[sequence.request.id] = sequence
            steps += 1
            assert steps < 1000
    assert model.statistics["largest"] <= chunk
    assert scheduler.pool.free == budget.pages, "pages leaked"
    assert sorted(finished) == list(range(len(asked)))
    for i, sequence in finished.items():
        tokens = _alone(prompts[i], limits[i], keys[i])
        if sequence.finish_reason == "abort":
            tokens = tokens[: len(sequence.tokens)]
        assert sequence.tokens.tolist() == tokens
        assert sequence.logprobs.tolist() == [-t for t in tokens]


def test_beginnings_are_found_until_their_pages_are_needed():
    prefix = PrefixCache(pages=20, page_size=4)
    tokens = np.arange(80, dtype=np.int32)
    chain = prefix.chain(tokens)
    pages = prefix.pool.take(20)
    prefix.add(chain, pages)
    prefix.pool.release(pages)
    assert (prefix.pool.free, prefix.pool.cached) == (20, 20)
    assert prefix.find(chain).tolist() == pages.tolist()
    other = tokens.copy()
    other[66] = 0  # in the seventeenth page
    assert prefix.find(prefix.chain(other)).tolist() == pages[:16].tolist()
    other[3] = 0
    assert not len(prefix.find(prefix.chain(other)))
    assert not len(prefix.find(chain[:15])), "shorter than it is worth"
    prefix.pool.take(3)  # the last pages of what is known
    assert prefix.find(chain).tolist() == pages[:17].tolist()
    prefix.pool.share(pages[:17])
    assert (prefix.pool.free, prefix.pool.cached) == (0, 0)
    prefix.clear()
    prefix.pool.release(pages[:17])
    assert (prefix.pool.free, prefix.pool.cached) == (17, 0)
    assert not len(prefix.find(chain))


def test_guesses_go_on_as_before():
    tokens = np.zeros((4, 12), np.int32)
    for row, text in zip(
        tokens, ([5, 6, 7, 8, 5, 6], [1, 2, 3], [4, 4, 4, 4], [9, 8, 9, 8, 7]), strict=True
    ):
        row[: len(text)] = text
    lengths = np.array([6, 3, 4, 5])
    counts = look_up(tokens, lengths, np.array([3, 3, 2, 3]))
    assert counts.tolist() == [3, 0, 1, 0]
    assert tokens[0, 6:9].tolist() == [7, 8, 5]
    assert tokens[2, 4] == 4
