"""Sessions: requests that come, go and are aborted while others run, each answered as if alone."""

import re

import numpy as np
import pytest
import random_requests
import request_checks
import torch
from small_models import Ids, far_from_flat

from llama2rt.errors import InputError
from llama2rt.generate import Engine, SamplingOptions


def _answers(session):
    """Runs all; request id -> (tokens, logprobs, text, finish_reason)."""
    found = {}
    while session.unfinished:
        for update in session.step():
            tokens, logprobs, text, _ = found.get(update.id, ([], [], "", None))
            found[update.id] = (
                tokens + update.tokens,
                logprobs + update.logprobs,
                text + update.text,
                update.finish_reason,
            )
    return found


@pytest.mark.parametrize("speculate", [0, 3])
def test_every_answer_as_if_alone(tmp_path, speculate):
    """The small one of benchmarks/generation/many_requests.py, which runs ten thousand."""
    model, tokenizer = random_requests.model_and_tokenizer(tmp_path)
    tight = random_requests.FewPages(model, tokenizer, page_size=4, speculate=speculate)
    asked = random_requests.draw(60, model.config.vocab_size, seed=3)
    result = random_requests.run(tight, asked, most_waiting=20)
    assert result["preemptions"] > 0 and result["prefix_hits"] > 0
    assert result["pages_leaked"] == 0
    assert (result["accepted"] > 0) == (speculate > 0)
    checked = request_checks.verify(tight, asked)
    assert checked["drawn"] == sum(len(one.tokens) for one in asked) - checked["ties"]
    assert checked["ties"] <= 2
    found, parted = request_checks.compare(Engine(model, tokenizer), asked[::4])
    assert found["equal"] > 8 and found["logprobs_apart"] < 1e-4
    assert len(parted) <= 1


def test_answers_are_those_of_generate(tokenizer):
    model = far_from_flat(vocab_size=tokenizer.vocab_size)
    engine = Engine(model, tokenizer)
    messages = [{"role": "user", "content": "questions about dates"}]
    prompts = [messages, [5, 6, 7]]
    options = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12, "seed": 5}
    with engine.session() as session:
        ids = [
            session.add(prompt, SamplingOptions(**options), sample=sample)
            for prompt in prompts
            for sample in range(3)
        ]
        answers = _answers(session)
    found = [answers[identifier] for identifier in ids]
    expected = [
        (c.tokens, c.logprobs, c.text, c.finish_reason)
        for prompt in prompts
        for c in engine.generate([prompt], n=3, **options)
    ]
    assert [(a[0], *a[2:]) for a in found] == [(e[0], *e[2:]) for e in expected]
    for a, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[1], e[1], atol=1e-5)


def test_prompts_that_begin_alike_are_computed_once():
    engine = Engine(far_from_flat(), Ids(-1), page_size=8)
    system = [3 + i % 50 for i in range(70)]
    with engine.session() as session:
        first = session.add([*system, 99], SamplingOptions(temperature=0, max_tokens=9))
        (tokens, *_) = _answers(session)[first]
        assert session.statistics.prefix_hits == 0 and session.statistics.prompt_tokens == 70
        # The next turn: the prompt, its answer, something new.
        turn = [*system, 99, *tokens, 98]
        second = session.add(turn, SamplingOptions(temperature=0, max_tokens=3))
        (again, *_) = _answers(session)[second]
        statistics = session.statistics
        assert statistics.prefix_hits == 72  # nine pages
        assert statistics.prompt_tokens == 70 + len(turn) - 1 - 72
        assert statistics.pages_used == 0 and statistics.pages_cached > 9
        assert again == engine.generate([turn], temperature=0, max_tokens=3)[0].tokens
        session.reset()
        assert session.statistics.pages_cached == 0
        session.add(turn, SamplingOptions(max_tokens=1))
        _answers(session)
        assert session.statistics.prefix_hits == 72


def test_other_weights_make_other_keys():
    model = far_from_flat()
    engine = Engine(model, Ids(-1), page_size=8)
    prompt = [3 + i % 50 for i in range(72)]
    greedy = SamplingOptions(temperature=0, max_tokens=6)
    with engine.session() as session:
        before = session.add(prompt, greedy)
        before = _answers(session)[before]
        running = session.add(prompt, greedy)
        (update,) = session.step()
        hits = session.statistics.prefix_hits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        (second,) = session.step()
        assert session.statistics.prefix_hits == hits
        rest = _answers(session)[running]
        after = session.add(prompt, greedy)
        after = _answers(session)[after]
    expected = engine.generate([prompt], temperature=0, max_tokens=6)[0]
    np.testing.assert_allclose(after[1], expected.logprobs, atol=1e-5)
    context = prompt + update.tokens
    (recomputed,) = engine.generate([context], temperature=0, max_tokens=5)
    assert second.tokens + rest[0] == recomputed.tokens
    assert abs(after[1][0] - before[1][0]) > 1e-3


def test_a_long_prompt_is_computed_in_chunks_beside_what_decodes(monkeypatch):
    monkeypatch.setattr("llama2rt.generate.budget.CHUNK_TOKENS", 16)
    engine = Engine(far_from_flat(), Ids(-1))
    with engine.session() as session:
        short = session.add([5, 6], SamplingOptions(temperature=0, max_tokens=20))
        session.step()
        long = session.add([7] * 80, SamplingOptions(temperature=0, max_tokens=2))
        first = {}
        for step in range(9):
            for update in session.step():
                first.setdefault(update.id, step)
                assert len(update.tokens) == 1
        assert first == {short: 0, long: 4}  # 79 tokens: four steps of 16, the fifth decodes too


def test_aborted_requests_leave_at_once():
    engine = Engine(far_from_flat(), Ids(-1), max_sequences=2)
    with engine.session() as session:
        ids = [session.add([5, 6, 7 + i], SamplingOptions(max_tokens=20)) for i in range(4)]
        session.step()
        assert (session.statistics.running, session.statistics.waiting) == (2, 2)
        assert session.abort(ids[0]) and session.abort(ids[3])
        assert not session.abort(ids[0]) and not session.abort(77)
        assert (session.statistics.running, session.statistics.waiting) == (1, 1)
        ended = {u.id: u for u in session.step() if u.finish_reason}
        assert {i: u.finish_reason for i, u in ended.items()} == {ids[0]: "abort", ids[3]: "abort"}
        assert ended[ids[3]].tokens == []
        assert sorted(_answers(session)) == [ids[1], ids[2]]
        assert session.statistics.pages_used == 0
        last = session.add([5], SamplingOptions())
        session.abort(last)
        assert session.unfinished and [u.id for u in session.step()] == [last]


def test_stop_texts_and_ids(tokenizer):
    model = far_from_flat(vocab_size=tokenizer.vocab_size)
    engine = Engine(model, tokenizer)
    (whole,) = engine.generate([[1, 5, 6]], temperature=1.5, max_tokens=40, seed=2)
    assert len(whole.text) > 20
    stop = re.search("[a-z]{3}", whole.text)[0]
    with engine.session() as session:
        drawn = {"temperature": 1.5, "max_tokens": 40, "seed": 2}
        by_text = session.add([1, 5, 6], SamplingOptions(**drawn, stop=stop))
        by_id = session.add([1, 5, 6], SamplingOptions(**drawn, stop_ids=(whole.tokens[4],)))
        shown = {by_text: "", by_id: ""}
        last = {}
        tokens = {by_text: [], by_id: []}
        while session.unfinished:
            for update in session.step():
                shown[update.id] += update.text
                tokens[update.id] += update.tokens
                last[update.id] = update.finish_reason
    assert set(last.values()) == {"stop"}
    assert shown[by_text] == whole.text[: whole.text.index(stop)]
    count = len(tokens[by_text])
    assert tokens[by_text] == whole.tokens[:count]
    decode = tokenizer.decode
    assert stop in decode([1, 5, 6, *whole.tokens[:count]])
    assert stop not in decode([1, 5, 6, *whole.tokens[: count - 1]])
    end = whole.tokens.index(whole.tokens[4]) + 1
    assert tokens[by_id] == whole.tokens[:end]
    assert whole.text.startswith(shown[by_id])


def test_likeliest_tokens_are_reported():
    engine = Engine(far_from_flat(), Ids(-1), speculate=2)
    with engine.session() as session:
        session.add([5, 6], SamplingOptions(temperature=0, max_tokens=30, logprobs=3))
        session.add([5, 7], SamplingOptions(max_tokens=3))
        updates = []
        while session.unfinished:
            updates += session.step()
    for update in updates:
        assert [len(each) for each in update.top] == [3] * len(update.tokens) * (update.id == 0)
        for token, logprob, top in zip(update.tokens, update.logprobs, update.top, strict=False):
            assert top[0] == (token, pytest.approx(logprob))
            assert top[0][1] >= top[1][1] >= top[2][1]


def test_a_session_says_what_it_cannot_do():
    engine = Engine(far_from_flat(), Ids())
    with engine.session() as session:
        for prompt, message in (([], "prompt: empty"), ([400], r"prompt: token id outside 0\.\.")):
            with pytest.raises(InputError, match=f"^{message}"):
                session.add(prompt, SamplingOptions())
    with pytest.raises(ValueError, match="session is closed"):
        session.add([5], SamplingOptions())
    with pytest.raises(InputError, match=r"^cache_bytes: expected at least") as refused:
        Engine(far_from_flat(), Ids(), cache_bytes=1).session()
    least = int(str(refused.value).split()[4])
    with Engine(far_from_flat(), Ids(), cache_bytes=least).session() as session:
        with pytest.raises(InputError, match=r"^cache_bytes: holds 1 pages of 16 tokens, a prompt"):
            session.add([5] * 10, SamplingOptions(max_tokens=7))
        session.add([5] * 10, SamplingOptions(max_tokens=6))
        assert _answers(session)


@pytest.mark.parametrize(
    "option",
    [
        *({"min_p": value} for value in (-0.1, 1.1, float("nan"))),
        *({"repetition_penalty": value} for value in (0, -1, float("inf"))),
        *({"stop": value} for value in ("", ("a", ""), (1,))),
        *({"stop_ids": value} for value in ((-1,), ("a",))),
        *({"logprobs": value} for value in (-1, 1.5, True)),
        *({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_tokens": 0}, {"seed": -1}),
    ],
    ids=str,
)
def test_an_option_outside_its_range_is_bad_input(option):
    (name,) = option
    with pytest.raises(InputError, match=f"^{name}: expected"):
        SamplingOptions(**option)
