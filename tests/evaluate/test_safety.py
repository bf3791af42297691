"""Violations and false refusals: what counts, over what, and how wide the intervals are."""

import pytest

from llama2rt.annotate.safety import Verdict
from llama2rt.data.records import Sample
from llama2rt.errors import InputError
from llama2rt.evaluate import intervals, safety

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def sample(prompt, kind="safety", risk="", attack="", turn=1, seed=None):
    messages = [USER, *[ANSWER, USER] * (turn - 1)]
    return Sample(prompt, messages, "text", seed=seed, kind=kind, risk_category=risk,
                  attack_vector=attack)  # fmt: skip


def test_each_rate_is_over_its_own_prompts():
    """What is unsafe on an ordinary prompt is no violation, what refuses an attack no mistake."""
    samples = [sample(f"s{i}") for i in range(4)] + [sample(f"h{i}", "helpfulness") for i in "abc"]
    verdicts = [Verdict(True, False), Verdict(False, True), Verdict(False, True), Verdict(None)]
    verdicts += [Verdict(True, True), Verdict(False, False), Verdict(False, None)]
    found = safety.measure(samples, verdicts)
    expected = intervals.wilson(1, 3)._asdict() | {"prompts": 3, "samples": 3, "unjudged": 1}
    assert found["violation"] == expected
    expected = intervals.wilson(1, 2)._asdict() | {"prompts": 2, "samples": 2, "unjudged": 1}
    assert found["false_refusal"] == expected
    assert found["by"] == {} and "turns" not in found
    assert safety.measure(samples[:4], verdicts[:4])["false_refusal"] is None


def test_several_answers_to_a_prompt_are_one_unit():
    samples = [sample("a"), sample("a"), sample("b"), sample("b")]
    verdicts = [Verdict(True), Verdict(False), Verdict(True), Verdict(True)]
    found = safety.measure(samples, verdicts)["violation"]
    assert found == intervals.wilson(1.5, 2)._asdict() | {
        "prompts": 2, "samples": 4, "unjudged": 0
    }  # fmt: skip


def test_by_risk_category_and_attack_vector():
    samples = [
        sample("a", risk="crime", attack="plea"),
        sample("b", risk="crime", attack="order"),
        sample("c", risk="hate", attack="plea"),
        sample("d", "helpfulness", risk="crime"),
        sample("e", "helpfulness"),
    ]
    verdicts = [Verdict(True), Verdict(False), Verdict(True)]
    verdicts += [Verdict(False, True), Verdict(False, False)]
    by = safety.measure(samples, verdicts)["by"]
    assert {name: rates["violation"]["mean"] for name, rates in by["risk_category"].items()} == {
        "crime": 0.5, "hate": 1.0
    }  # fmt: skip
    assert by["risk_category"]["crime"]["false_refusal"]["mean"] == 1.0  # the borderline ones
    assert by["risk_category"]["hate"]["false_refusal"] is None
    assert [by["attack_vector"][n]["violation"]["mean"] for n in ("plea", "order")] == [1.0, 0.0]


def test_by_turn_and_in_a_conversation_so_far():
    """A prompt that is answered once only, with turns before it, is no attack of several turns."""
    unsafe = {"a": [False, True, False], "b": [False, False], "c": [True, False, True]}
    samples = [sample(p, turn=i + 1) for p, own in unsafe.items() for i in range(len(own))]
    verdicts = [Verdict(said) for own in unsafe.values() for said in own]
    samples.append(sample("d", turn=2))
    verdicts.append(Verdict(True))
    rows = safety.measure(samples, verdicts)["turns"]
    means = [(r["turn"], r["violation"]["mean"], r["violation"]["prompts"]) for r in rows]
    assert means == [(1, pytest.approx(1 / 3), 3), (2, pytest.approx(1 / 3), 3), (3, 0.5, 2)]
    assert [row["so_far"]["mean"] for row in rows] == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),  # b, which has ended safely, counts on
    ]


def test_conversations_of_one_prompt_are_told_apart_by_their_seeds():
    samples = [sample("a", turn=t, seed=s) for s in (0, 1) for t in (1, 2)]
    verdicts = [Verdict(said) for said in (True, False, False, False)]
    rows = safety.measure(samples, verdicts)["turns"]
    assert [row["so_far"]["mean"] for row in rows] == [0.5, 0.5]
    assert [row["violation"]["mean"] for row in rows] == [0.5, 0.0]


def test_paired_differences_are_over_shared_prompts():
    first = [sample("a"), sample("b"), sample("x"), sample("h", "helpfulness")]
    second = [sample("b"), sample("a"), sample("y"), sample("h", "helpfulness")]
    said = [Verdict(True), Verdict(True), Verdict(False), Verdict(False, False)]
    other = [Verdict(False), Verdict(True), Verdict(True), Verdict(False, True)]
    found = safety.paired("violation", (first, second), (said, other))
    assert (found["mean"], found["prompts"]) == (-0.5, 2)
    assert safety.paired("false_refusal", (first, second), (said, other))["mean"] == 1.0
    assert safety.paired("false_refusal", (first[:2], second), (said[:2], other)) is None


def test_a_sample_must_say_its_kind():
    with pytest.raises(InputError, match="sample 2, of prompt 'b': kind: missing"):
        safety.measure([sample("a"), sample("b", "")], [Verdict(True)] * 2)
