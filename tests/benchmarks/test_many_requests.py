"""The benchmark of many requests passes in small, and finds what it is there to find."""

import json
from pathlib import Path

import pytest
import random_requests
import request_checks
from processes import load_script, run_python

from llama2rt.generate.kv_cache import PagePool
from llama2rt.generate.slots import Slots

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "generation" / "many_requests.py"


def test_a_record_of_every_setting(tmp_path):
    out = tmp_path / "many-requests.json"
    run_python(SCRIPT, "--requests", 60, "--weights", "same", "int8", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["weights"], row["path"]) for row in rows] == [
        ("same", "packed fp32"),
        ("int8", "packed int8"),
    ]
    for row in rows:
        assert row["failures"] == row["parted"]["first"] == []
        assert row["parted"]["greedy"] == row["parted"]["sampled"] == row["ties"] == 0
        assert row["equal"] + row["aborted_and_equal"] == 60
        assert row["aborted_and_equal"] == row["aborted"] > row["aborted_with_tokens"] > 0
        assert row["preemptions"] > 0 and row["pages_leaked"] == 0
        assert list(row["resident_mib"]) == ["6", "15", "30", "45", "60"]
        assert row["forward_pass"]["drawn"] > 500


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture
def failures(script):
    """What a run of sixty requests finds wrong."""
    settings = script.Settings(60, seed=0, dtype="float32", weights="same", speculate=0)
    return lambda: " / ".join(script.one_run(settings)["failures"])


def test_a_leaked_page_is_found(failures, monkeypatch):
    release, calls = PagePool.release, iter(range(10**6))

    def all_but_one(pool, pages):
        release(pool, pages[1:] if next(calls) == 20 else pages)

    monkeypatch.setattr(PagePool, "release", all_but_one)
    assert failures() == "1 pages leaked"


def test_a_page_that_is_freed_twice_is_found(failures, monkeypatch):
    release, done = PagePool.release, []

    def one_again(pool, pages):
        release(pool, pages)
        last = pages[-1:]
        if not done and len(last) and not pool._references[last] and not pool._kept[last]:
            done.append(last)
            pool._references[last] += 1
            release(pool, last)

    monkeypatch.setattr(PagePool, "release", one_again)
    assert "answers are not those that their requests get alone" in failures()  # two wrote it
    assert done


def test_a_page_that_is_free_twice_at_the_end_is_found(tmp_path):
    model, tokenizer = random_requests.model_and_tokenizer(tmp_path)
    with random_requests.FewPages(model, tokenizer).session() as session:
        stack = session._scheduler.pool._stack
        stack[0] = stack[1]
        with pytest.raises(AssertionError, match="a page was freed twice"):
            random_requests._leaked(session)


def test_a_wrong_token_is_found(failures, monkeypatch):
    """Sequences that are computed again lose the number of one token that they had."""
    enter = Slots.enter

    def forgetful(slots, sequence, context, pages, cached):
        if len(sequence.tokens):
            context = context.copy()
            context[-1] = (context[-1] + 1) % 300
        return enter(slots, sequence, context, pages, cached)

    monkeypatch.setattr(Slots, "enter", forgetful)
    found = failures()
    assert "answers are not those that their requests get alone" in found
    assert "a forward pass of its own" in found


def test_altered_text_and_an_altered_end_are_found(failures, monkeypatch):
    run = random_requests.run

    def altered(engine, asked, *rest, **options):
        result = run(engine, asked, *rest, **options)
        whole = [one for one in asked if one.finish_reason != "abort"]
        whole[3].text += "e"
        whole[4].tokens.pop()
        whole[4].logprobs.pop()
        return result

    monkeypatch.setattr(random_requests, "run", altered)
    assert failures().startswith("2 answers are not those that their requests get alone")


def test_other_log_probabilities_and_no_preemption_are_found(failures, monkeypatch):
    budget = random_requests.Budget(pages=400, prefill_tokens=64, sequences=16)
    monkeypatch.setattr(random_requests.FewPages, "budget", budget)
    take = random_requests.Asked.take

    def drifting(asked, update):
        take(asked, update)
        if asked.logprobs:
            asked.logprobs[0] += 1e-3

    monkeypatch.setattr(random_requests.Asked, "take", drifting)
    assert failures().startswith("nothing was preempted / log-probabilities differ by 0.0")


def test_memory_that_grows_is_found(failures, monkeypatch):
    real, held = random_requests.resident_bytes, []

    def growing():
        held.append(bytearray(2**20))
        return real()

    monkeypatch.setattr(random_requests, "resident_bytes", growing)
    assert failures().startswith("memory grew by")


def test_only_greedy_answers_part_at_a_tie():
    def parted(**what):
        return request_checks.Parted(0, "5, alone 6", **what)

    assert parted(greedy=True, token=3, gap=0.9e-4).tie
    assert not parted(greedy=True, token=3, gap=1.1e-4).tie
    assert not parted(greedy=False, token=3, gap=0.0).tie
    assert not parted(greedy=True).tie


def test_how_near_a_border_a_draw_was(tmp_path):
    model, tokenizer = random_requests.model_and_tokenizer(tmp_path)
    engine = random_requests.FewPages(model, tokenizer)
    asked = random_requests.draw(30, model.config.vocab_size, seed=0)
    random_requests.run(engine, asked, most_waiting=24)
    one = next(a for a in asked if a.options.temperature == 1 and len(a.tokens) > 8)
    drawn = one.tokens[8]
    logits = request_checks._logits(engine, one.prompt + one.tokens.tolist())
    draws = request_checks.Draws(one, logits)
    uniform, original = float(draws.uniform[8]), request_checks.uniforms
    # The uniform number that is a border of what is drawn, by bisection.
    low, high = 0.0, 1.0 - uniform
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if draws.tokens(middle)[8] == drawn else (low, middle)
    (other,) = {int(draws.tokens(high)[8])} - {drawn}
    pair = (drawn, other)
    for near, border in ((3e-7, 1e-6), (3e-5, 1e-4), (3e-4, None)):
        moved = lambda keys, counts, by=low - near: original(keys, counts) + by  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(request_checks, "uniforms", moved)
            assert request_checks._border(engine, one, 8, pair) == border
