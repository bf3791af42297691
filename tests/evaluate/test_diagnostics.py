"""Diagnostics against numbers counted by hand, on plain objects that no stage made."""

import json
from dataclasses import dataclass, replace

import pytest

from llama2rt.data.records import Comparison, Prompt
from llama2rt.evaluate import diagnostics
from llama2rt.evaluate.intervals import bootstrap, wilson


@dataclass(frozen=True)
class Said:
    prompt: Prompt
    text: str
    tokens: list[int]
    finished: bool
    reward: float
    scores: dict[str, float]
    temperature: float = 1.0


def _prompt(number, kind="helpfulness"):
    return Prompt(f"p{number}", [{"role": "user", "content": "?"}], kind)


def _group(number, rewards, kind="helpfulness", scores=("helpfulness", "safety"), **fields):
    return [
        Said(
            _prompt(number, kind),
            "two words" if i % 2 else "one",
            list(range(i + 1)),
            finished=i != 0,
            reward=reward,
            scores=dict.fromkeys(scores, 0.25 * (i + 1)),
            **fields,
        )
        for i, reward in enumerate(rewards)
    ]


def _versions():
    """Two prompts, the second about safety, two samples each."""
    return {
        "SFT": [_group(0, [0.0, 2.0]), _group(1, [-1.0, 1.0], "safety")],
        "V1": [_group(0, [1.0, 3.0]), _group(1, [-2.0, 0.0], "safety")],
    }


WORTH = {"SFT": [[0.0, 1.0], [0.5, 0.5]], "V1": [[1.0, 0.5], [0.0, 1.0]]}


def test_a_row_a_version_counted_by_hand():
    numbers = diagnostics.of_versions(_versions(), worth=WORTH)
    sft, first = numbers["versions"]
    assert (sft["name"], first["name"]) == ("SFT", "V1")
    assert (sft["prompts"], sft["samples"], sft["temperature"]) == (2, 2, 1.0)
    # Means of a prompt's samples: 1 and 0 in SFT, 2 and -1 in V1.
    assert sft["reward"] == bootstrap([1.0, 0.0])._asdict()
    assert first["reward"] == {"mean": 0.5, "low": -1.0, "high": 2.0}
    # Scores of 0.25 and 0.5, lengths of 1 and 2, the first of two cut, on both prompts.
    for key in ("helpfulness", "safety"):
        assert sft["scores"][key] == {"mean": 0.375, "low": 0.375, "high": 0.375}
    assert sft["tokens"]["mean"] == sft["words"]["mean"] == 1.5
    assert sft["cut_share"] == wilson(1.0, 2)._asdict()
    assert sft["cut_share"]["low"] < 0.15 and sft["cut_share"]["high"] > 0.85
    # Rc: sigmoid(0) = 1/2, sigmoid(2) = 0.8808; of -1 and 1 they are 0.2689 and 0.7311.
    assert sft["kinds"]["helpfulness"]["prompts"] == 1
    assert sft["kinds"]["helpfulness"]["score"]["mean"] == pytest.approx(0.690399, abs=1e-6)
    assert sft["kinds"]["safety"]["score"]["mean"] == pytest.approx(0.5)
    assert sft["kinds"]["safety"]["worth"]["mean"] == 0.5
    assert sft["worth"]["mean"] == 0.5 and first["worth"]["mean"] == pytest.approx(0.625)
    assert "kl" not in sft


def test_win_rates_by_reward_and_by_the_judge():
    numbers = diagnostics.of_versions(_versions(), worth=WORTH)
    # By reward, V1 over SFT: prompt 0, 1 and 3 against 0 and 2: three of four pairings; prompt 1,
    # -2 and 0 against -1 and 1: one of four.
    wins = numbers["reward_win_rates"]
    assert wins["names"] == ["SFT", "V1"]
    assert wins["row_over_column"] == [[None, 0.5], [0.5, None]]
    assert wins["low"][0][1] == pytest.approx(wilson(1.0, 2).low)
    assert wins["high"][1][0] == pytest.approx(wilson(1.0, 2).high)
    # By the judge, V1 over SFT: prompt 0, 1 and 0.5 against 0 and 1: 1, 1/2 and 1, 0: 5/8;
    # prompt 1, 0 and 1 against 0.5 twice: half.
    wins = numbers["win_rates"]
    assert wins["row_over_column"][1][0] == pytest.approx((5 / 8 + 1 / 2) / 2)
    assert wins["row_over_column"][0][1] == pytest.approx((3 / 8 + 1 / 2) / 2)
    assert wins["low"][0][1] == pytest.approx(1 - wins["high"][1][0])
    assert "win_rates" not in diagnostics.of_versions(_versions())


def test_length_correlation_is_of_tokens_and_none_where_undefined():
    versions = _versions()
    versions["V1"][0] = _group(0, [5.0, 5.0])
    found = diagnostics.length_bias(versions)
    # Rewards rise with the number of tokens on every prompt where they differ.
    assert found["SFT"]["per_prompt"] == pytest.approx([1.0, 1.0])
    assert (found["SFT"]["mean"], found["SFT"]["undefined"]) == (pytest.approx(1.0), 0)
    assert found["V1"]["per_prompt"][0] is None and found["V1"]["undefined"] == 1


def test_kl_is_a_number_or_one_a_prompt():
    kl = {"V1": {"k1": [1.0, 3.0], "k3": 2.5}}
    sft, first = diagnostics.of_versions(_versions(), kl=kl)["versions"]
    assert "kl" not in sft
    assert first["kl"]["k1"] == {"mean": 2.0, "low": 1.0, "high": 3.0}
    assert first["kl"]["k3"] == {"mean": 2.5, "low": None, "high": None}
    with pytest.raises(ValueError, match="kl k1 of V1: expected a number or one for each of 2"):
        diagnostics.of_versions(_versions(), kl={"V1": {"k1": [1.0, 2.0, 3.0]}})
    with pytest.raises(ValueError, match="kl k3 of V1: not finite"):
        diagnostics.of_versions(_versions(), kl={"V1": {"k3": float("nan")}})
    with pytest.raises(ValueError, match=r"kl: no version 'V9' among \['SFT', 'V1'\]"):
        diagnostics.of_versions(_versions(), kl={"V9": {"k3": 1.0}})


def test_one_sample_one_kind_and_no_safety_model():
    one = {"only": [_group(i, [1.0], scores=("helpfulness",)) for i in range(3)]}
    numbers = diagnostics.of_versions(one, worth={"only": [[0.5]] * 3})
    (row,) = numbers["versions"]
    assert list(row["scores"]) == ["helpfulness"] and list(row["kinds"]) == ["helpfulness"]
    assert row["reward"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert row["cut_share"]["mean"] == 1.0 and row["cut_share"]["low"] < 0.5
    assert numbers["reward_win_rates"]["row_over_column"] == [[None]]
    bias = diagnostics.length_bias(one)["only"]
    assert (bias["mean"], bias["undefined"]) == (None, 3)
    against = numbers["reward_against_judge"]["helpfulness"]["only"]
    nothing = {"mean": None, "low": None, "high": None, "undefined": 3}
    assert against["pooled"] == nothing and against["per_prompt"] == nothing
    assert [found["responses"] for found in against["bins"]] == [3]


def test_reward_against_judge_keeps_kinds_of_prompts_apart():
    # On each kind the judge's order is the reward's; the safety prompts have all the low rewards
    # and all the high worths, which together would look like the opposite.
    groups = [_group(i, [5.0, 6.0]) for i in range(5)]
    groups += [_group(i, [-6.0, -5.0], "safety") for i in range(5, 10)]
    worth = {"V1": [[0.0, 1.0]] * 5 + [[10.0, 11.0]] * 5}
    found = diagnostics.of_versions({"V1": groups}, worth=worth)["reward_against_judge"]
    assert list(found) == ["helpfulness", "safety"]
    for kind, at in (("helpfulness", 5.5), ("safety", -5.5)):
        assert found[kind]["V1"]["pooled"]["mean"] == found[kind]["V1"]["per_prompt"]["mean"] == 1
        (only,) = found[kind]["V1"]["bins"]
        assert (only["reward"], only["responses"]) == (at, 10)


def test_equal_rewards_tie_everywhere():
    flat = {name: [_group(0, [1.0, 1.0]), _group(1, [1.0, 1.0])] for name in ("A", "B")}
    numbers = diagnostics.of_versions(flat)
    assert numbers["reward_win_rates"]["row_over_column"] == [[None, 0.5], [0.5, None]]
    assert diagnostics.length_bias(flat)["A"]["undefined"] == 2


def test_two_samples_of_a_prompt_are_too_few_for_a_correlation():
    for samples in (1, 2, 3):
        groups = [_group(i, [float(i + s) for s in range(samples)]) for i in range(2)]
        found = diagnostics.of_versions({"V1": groups})
        assert ("length_correlation" in found) == (samples > 2)


def test_numbers_are_plain_json():
    numbers = diagnostics.of_versions(_versions(), worth=WORTH, kl={"V1": {"k1": [1.0, 2.0]}})
    numbers["best_of"] = diagnostics.sampling(_versions())
    numbers["drift"] = diagnostics.drift({"1": {"after": ([1.0], [0.0])}})
    pairs = [Comparison([], "a", "b", source=source) for source in ("x", "y")]
    numbers["reward_models"] = diagnostics.of_reward_model([1.0, 2.0], [0.0, 3.0], pairs)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.clear(), "no version to compare"),
        (lambda v: v.update(V1=[]), "V1: no responses"),
        (lambda v: v["V1"].reverse(), "V1 answers other prompts than SFT, or in another order"),
        (lambda v: v["V1"].pop(), "V1 answers other prompts"),
        (lambda v: v["V1"][1].pop(), "V1: expected as many samples of every prompt, got 2 and 1"),
        (
            lambda v: v["V1"][0].__setitem__(0, v["V1"][1][0]),
            "V1: a group of samples answers several prompts",
        ),
        (
            lambda v: v["V1"][0].__setitem__(1, replace(v["V1"][0][1], temperature=0.7)),
            r"at one temperature, got \{'SFT': \[1.0\], 'V1': \[0.7, 1.0\]\}",
        ),
        (
            lambda v: v["V1"][0].__setitem__(1, replace(v["V1"][0][1], reward=float("nan"))),
            "V1: a reward is not finite",
        ),
        (
            lambda v: v["V1"][0].__setitem__(1, replace(v["V1"][0][1], scores={"safety": 1.0})),
            r"V1: expected the scores of \['helpfulness', 'safety'\] on every response",
        ),
    ],
)
def test_versions_that_cannot_be_compared_are_refused(change, message):
    versions = _versions()
    change(versions)
    with pytest.raises(ValueError, match=message):
        diagnostics.of_versions(versions)


@pytest.mark.parametrize(
    ("worth", "message"),
    [
        ({"SFT": WORTH["SFT"]}, "worth: missing for V1"),
        (WORTH | {"V2": []}, "worth: no version 'V2'"),
        (WORTH | {"V1": [[1.0, 1.0]]}, "worth of V1: expected 2 prompts of 2 samples each"),
        (WORTH | {"V1": [[1.0, 1.0], [1.0]]}, "worth of V1: expected 2 prompts of 2 samples"),
        (WORTH | {"V1": [[1.0, 1.0], [1.0, float("inf")]]}, "worth of V1: not finite"),
    ],
)
def test_worth_must_fit_the_responses(worth, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.of_versions(_versions(), worth=worth)


def test_curves_by_version_and_temperature():
    mixed = [
        _group(0, [1.0, 3.0]) + _group(0, [5.0], temperature=0.7),
        _group(1, [0.0, 4.0]) + _group(1, [7.0], temperature=0.7),
    ]
    curves = diagnostics.sampling({"SFT": mixed, "V1": mixed[:1]})
    assert list(curves) == ["SFT", "V1"] and list(curves["SFT"]) == ["0.7", "1.0"]
    assert curves["SFT"]["1.0"]["n"] == [1, 2]
    # One sample: the mean of all; two: the larger of each prompt, and the mean as the median.
    assert curves["SFT"]["1.0"]["max"] == pytest.approx([2.0, 3.5])
    assert curves["SFT"]["1.0"]["median"] == pytest.approx([2.0, 2.0])
    assert curves["SFT"]["0.7"]["max"] == pytest.approx([6.0])
    assert curves["V1"]["1.0"]["max"] == pytest.approx([2.0, 3.0])


def test_a_temperature_needs_samples_of_every_prompt():
    mixed = [_group(0, [1.0]) + _group(0, [5.0], temperature=0.7), _group(1, [0.0, 4.0])]
    with pytest.raises(ValueError, match=r"SFT at temperature 0\.7: expected as many samples"):
        diagnostics.sampling({"SFT": mixed})


def test_a_reward_model_by_rating_and_source():
    pairs = [
        Comparison([], "a", "b", rating, source=source)
        for rating, source in (("better", "hh"), ("better", "shp"), (None, "hh"), ("better", ""))
    ]
    found = diagnostics.of_reward_model([2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 1.0, 0.0], pairs)
    assert found["accuracy"] == {"better": pytest.approx(2 / 3), "unrated": 0.5, "average": 0.625}
    assert [row["rating"] for row in found["intervals"]] == ["better", "unrated", "average"]
    assert list(found["sources"]) == ["hh", "none", "shp"]
    assert found["sources"]["hh"] == {**wilson(1.5, 2)._asdict(), "pairs": 2, "ties": 1}
    assert found["sources"]["shp"]["mean"] == 0.0 and found["sources"]["none"]["mean"] == 1.0
    assert found["calibration"]["pairs"] == 4
    alone = diagnostics.of_reward_model([1.0], [0.0], [Comparison([], "a", "b")])
    assert "sources" not in alone


def test_drift_before_and_after_a_refresh():
    before = [0.0, 0.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]  # one right, one tie
    after = [2.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]  # three right
    found = diagnostics.drift({"SFT": {"after": after}, "V1": {"before": before, "after": after}})
    assert list(found) == ["SFT", "V1"] and list(found["SFT"]) == ["after"]
    assert found["V1"]["before"] == {**wilson(1.5, 4)._asdict(), "pairs": 4, "ties": 1}
    assert found["V1"]["after"] == {**wilson(3.0, 4)._asdict(), "pairs": 4, "ties": 0}
    # By pair the change is 1, 0, 0, 1/2.
    assert found["V1"]["change"] == bootstrap([1.0, 0.0, 0.0, 0.5])._asdict()


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({}, "V1: expected scores before and after, got"),
        ({"later": ([1.0], [0.0])}, r"V1: expected scores before and after, got \['later'\]"),
        (
            {"before": ([1.0], [0.0]), "after": ([1.0, 2.0], [0.0, 0.0])},
            "V1: expected the same pairs, got 1 before and 2 after",
        ),
        ({"after": ([], [])}, "non-empty"),
    ],
)
def test_a_batch_that_does_not_pair_up_is_refused(sides, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.drift({"V1": sides})


def test_a_share_keeps_its_interval_at_zero():
    assert diagnostics.estimate([0.0] * 20, share=True) == wilson(0, 20)._asdict()
    assert diagnostics.estimate([0.0] * 20) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\]"):
        diagnostics.estimate([1.5, 1.0], share=True)
