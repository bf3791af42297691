"""Online DPO beyond pairs of its own: offline comparisons, a second agent, losses of groups and of
answers by themselves; and the offline stage."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import json_lines
import numpy as np
import pocket as problem
import pytest
import torch
from pocket import response
from pydantic import ValidationError

from llama2rt.algorithms import losses
from llama2rt.data.groups import pack_groups
from llama2rt.data.loader import GroupLoader
from llama2rt.data.packing import Example
from llama2rt.data.readers import read, write
from llama2rt.errors import InputError
from llama2rt.rollout.logprobs import response_logprobs
from llama2rt.rollout.responses import read_responses, response_example
from llama2rt.run import Run
from llama2rt.stages import direct, dpo, exploration, history, loading, offline
from llama2rt.stages.exploration import SecondAgent
from llama2rt.stages.history import History

TRAIN = {"lr": 1e-3, "checkpoint_every": 2, "log_every": 1}


def online(pocket, **settings) -> dpo.DpoRecipe:
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "iterations": 2,
        "prompts_per_iteration": 8,
        "samples": 4,
        "sampling.max_tokens": 8,
        "batch_size": 8,
        "epochs": 1,
        "train": TRAIN,
    }
    return dpo.DpoRecipe(**problem.tables(given | settings))


def from_files(pocket, **settings) -> offline.OfflineRecipe:
    given = {
        "init": pocket.sft,
        "data": [pocket.helpfulness_comparisons],
        "held_out": 20,
        "batch_size": 16,
        "epochs": 4,
        "train": TRAIN,
    }
    return offline.OfflineRecipe(**(given | settings))


def summary(directory) -> dict:
    return json.loads((directory / "report.json").read_text())


HYBRID = {
    "offline_share": 0.25,
    "second.samples": 2,
    "second.best_of": 3,
    "second.iterations_back": 1,
    "length_penalty": 0.01,
}


@pytest.mark.parametrize("kind", ["infonca", "kto_unpaired"])
def test_everything_at_once_resumes_to_the_bit(pocket, tmp_path, monkeypatch, kind):
    settings = online(pocket, kind=kind, offline=[pocket.helpfulness_comparisons], **HYBRID)
    whole = dpo.run(settings, tmp_path / "whole" / "run")
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "log", 5, dpo.run, settings, tmp_path / "killed" / "run"
    )
    assert problem.weights(whole) == problem.weights(resumed)
    root = tmp_path / "whole" / "run"
    for folder in ("", "iteration-1", "iteration-2"):
        again = tmp_path / "killed" / "run" / folder
        assert problem.metrics(root / folder) == problem.metrics(again)

    first, second = (summary(root / f"iteration-{i}") for i in (1, 2))
    assert second["second/kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert 0 <= second["second/best_share"] <= 1
    unit = {"infonca": "groups", "kto_unpaired": "answers"}[kind]
    for found in (first, second):
        share = found["offline"] / found[unit]
        assert share == pytest.approx(0.25, abs=0.5 / found[unit] + 1e-9)
    assert second["offline"] > first["offline"] > 0
    assert "desirable" in first if kind == "kto_unpaired" else "desirable" not in first
    # The second agent of the second iteration is what the first one began with.
    for iteration in (1, 2):
        folder = root / f"iteration-{iteration}" / "samples"
        drawn = read_responses(folder / "second" / "part-00000.jsonl")
        assert {r.policy for r in drawn} == {str(pocket.sft)}
        compared = read_responses(folder / exploration.COMPARED)
        assert len(drawn) == 8 * 2 * 3 and len(compared) == 8 * (4 + 2)
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["offline"]["composition"][0]["used"] > 20
    assert manifest["offline"]["composition"][0]["key"] == "offline.0"
    assert "rewards" in manifest["recipe"] and manifest["recipe"]["kind"] == kind


def test_offline_comparisons_of_held_out_prompts_are_left_out(pocket, tmp_path):
    settings = online(
        pocket,
        validation=[pocket.prompts],
        offline=[pocket.helpfulness_comparisons],
        offline_filters={"least_rating": "better"},
    )
    with pytest.raises(InputError, match="prompts of all its comparisons are held out"):
        dpo.open_inputs(settings)
    found = dpo.open_inputs(settings.model_copy(update={"validation": []})).offline
    records = read(pocket.helpfulness_comparisons, "comparison")
    kept = [c for c in records if c.rating == "significantly_better"]
    assert len(found.pairs) == len(kept) < len(records)
    assert found.account.report()["filters"]["least_rating"]["removed"]


def test_the_second_agent_hands_in_its_best(pocket):
    settings = online(pocket, **{"second.samples": 2, "second.best_of": 2, "length_penalty": 0.1})
    drawn = [
        *(response("short", 1.0), response("a much longer answer", 1.5)),
        *(response("", 9.0, tokens=(2,)), response("spoken", -1.0)),
    ]
    assert [r.text for r in exploration.handed_in(settings, drawn)] == ["short", "spoken"]
    own, second = response("own", 0.0), response("second", 1.0)
    group = [own] * 4 + [second] * 2
    found = exploration.numbers(settings, [group], [(second, own), (own, own)])
    assert (found["second/best_share"], found["second/worst_share"]) == (0.5, 0.0)
    policies = ["init", "first", "second"]
    for back, expected in enumerate(["second", "first", "init", "init"]):
        assert SecondAgent(samples=1, iterations_back=back).folder(policies) == expected
    assert SecondAgent(samples=1).kl_bound == 0


def test_answers_with_labels_and_other_prompts():
    groups = [
        [response("a", 3.0, name="x"), response("b", 1.0, name="x"), response("c", 0.0, name="x")],
        [response("d", 1.0, name="y"), response("d", 1.0, name="y")],
        [response("e", 2.0, name="z"), response("f", -2.0, name="z")],
    ]
    prompts = {"x": [1, 5], "y": [1, 6], "z": [1, 7, 8]}
    given = [
        [replace(r, prompt_tokens=prompts[r.prompt.id], tokens=[ord(r.text), 2]) for r in group]
        for group in groups
    ]
    scored = history.of_samples(given, "groups", 0.0, 2.0, 64)
    assert [len(group) for group in scored.groups] == [3, 2]
    expected = torch.tensor([1.5, 0.5, 0.0]).softmax(0).numpy()
    assert np.allclose(scored.extras["label"][:3], expected)
    assert scored.extras["side"].tolist() == [1, 0, -1, 1, -1]

    alone = history.of_samples(given, "answers", 0.0, 1.0, 64)
    assert alone.extras["desirable"].tolist() == [True, False, False, True, False]
    answered = [one.tokens.tolist() for one in alone.mismatched]
    e, f, a, b = map(ord, "efab")
    assert answered[0] == [1, 5, e, 2] and answered[1] == [1, 5, f, 2]
    assert answered[3] == [1, 7, 8, a, 2] and answered[4] == [1, 7, 8, b, 2]
    assert [int(one.trainable.sum()) for one in alone.mismatched] == [2] * 5
    cut = history.of_samples(given, "answers", 0.0, 1.0, 4)
    assert cut.mismatched[3].tokens.tolist() == [1, 7, 8, a]
    with pytest.raises(InputError, match="all answers are to one"):
        history.of_samples(given[:1], "answers", 0.0, 1.0, 64)
    # An iteration that leaves one prompt takes the answers of those before it.
    late = history.of_samples(given[:1], "answers", 0.0, 1.0, 64, alone.groups)
    assert [one.tokens.tolist() for one in late.mismatched] == [[1, 5, e, 2]] * 3


@pytest.mark.parametrize("kind", ["infonca", "nca_group", "kto_unpaired"])
def test_losses_equal_one_response_at_a_time(pocket, tmp_path, kind):
    model, _ = loading.load_llama(pocket.sft)
    reference, _ = loading.load_llama(pocket.sft)
    with torch.no_grad():
        model.output.weight.mul_(1.1)
    first = [response("x", r, tokens=t) for r, t in ((1.0, (9, 10, 2)), (0.0, (13, 2)))]
    other = replace(response("z", 0.5, name="c", tokens=(14, 15, 16)), prompt_tokens=[1, 9])
    groups = [
        tuple(map(response_example, first)),
        tuple(response_example(replace(other, tokens=t)) for t in ([14, 2], [15], [16, 17, 2])),
    ]
    unit = direct.UNITS[kind]
    if unit == "groups":
        labels = np.concatenate([[0.7, 0.3], [0.2, 0.5, 0.3]])
        past = History(groups, {"label": labels, "side": np.array([1, -1, 0, 1, -1.0])})
    else:
        past = history.of_answers(groups, np.array([True, False, False, True, True]), 64)
    settings = online(pocket, kind=kind, beta=0.3)
    inputs = SimpleNamespace(reference=reference)
    past = direct.with_reference(settings, past, inputs, "", tmp_path / "sums")

    def ratio(document):
        own, theirs = (response_logprobs(m, [document], 1.0, 99)[0] for m in (model, reference))
        return float(own.sum() - theirs.sum())

    ratios = torch.tensor([ratio(document) for group in groups for document in group])
    micro = pack_groups(past.groups, past.extras, past.mismatched or None)
    loss = direct.loss(settings)
    if loss.survey is not None:
        with torch.no_grad():
            loss.survey(model, [micro])
    found, metrics = loss(model, micro)
    if unit == "groups":
        sizes, label = torch.tensor([2, 3]), torch.tensor(labels).float()
        expected = getattr(losses, kind)(ratios, label, sizes, 0.3).sum()
    else:
        kl = np.mean([ratio(document) for document in past.mismatched])
        desirable = torch.from_numpy(past.extras["desirable"])
        expected = losses.kto_unpaired(ratios, desirable, kl, beta=0.3, weights=(1, 1)).sum()
        assert float(metrics["kl"]) / 5 == pytest.approx(kl, rel=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["kto", "kto_unpaired"])
def test_kto_does_not_depend_on_micro_batches(pocket, tmp_path, kind):
    logged = []
    for micro_tokens in (40, 4096):
        train = TRAIN | {"lr": 2e-3, "micro_tokens": micro_tokens, "checkpoint_every": 0}
        said = tmp_path / "said.jsonl"
        write(said, problem.comparisons("helpfulness", problem.TRAINING[:12], 0))
        sizes = {"held_out": 0, "batch_size": 8, "epochs": 3}
        settings = from_files(pocket, data=[said], kind=kind, beta=1.0, train=train, **sizes)
        offline.run(settings, tmp_path / str(micro_tokens))
        logged.append(json_lines.read(tmp_path / str(micro_tokens) / "metrics.jsonl"))
    assert len(logged[0]) == len(logged[1]) > 8
    for one, other in zip(*logged, strict=True):
        for name in ("loss", "gradient_norm", "margin"):
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name
    if kind == "kto_unpaired":
        assert max(line["kl"] for line in logged[0]) > 0


def test_offline_learns_what_annotators_said_and_resumes(pocket, tmp_path, monkeypatch):
    settings = from_files(pocket)
    whole = offline.run(settings, tmp_path / "whole")
    found = summary(tmp_path / "whole")
    assert found["accuracy"]["average"] > 0.8
    assert found["trained_on"] + 20 == len(read(pocket.helpfulness_comparisons, "comparison"))
    margins = [line["margin"] for line in problem.metrics(tmp_path / "whole") if "margin" in line]
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[-1] > 0.1
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "log", 7, offline.run, settings, tmp_path / "killed"
    )
    assert problem.weights(whole) == problem.weights(resumed)


def test_group_loader_resumes_and_knows_its_data():
    groups = [[Example.of([i, j, 5]) for j in range(1 + i % 3)] for i in range(7)]
    count = sum(map(len, groups))
    extras = {"number": np.arange(count)}

    def loader(groups=groups):
        return GroupLoader(groups, extras, 3, 12, 0, mismatched=[g[0] for g in groups])

    one = loader()
    seen = [[micro.extras["number"].tolist() for micro in one.next()] for _ in range(3)]
    assert sorted(n for step in seen for micro in step for n in micro) == list(range(count))
    other = loader()
    other.next()
    third = loader()
    third.load_state_dict(other.state_dict())
    for expected in seen[1:]:
        micros = third.next()
        assert [micro.extras["number"].tolist() for micro in micros] == expected
        assert all(len(m.sizes) == m.mismatched.documents == m.weight for m in micros)
    changed = [[Example.of([9, 9, 9])], *groups[1:]]
    with pytest.raises(InputError, match="cannot resume: content"):
        loader(changed).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="number"):
        pack_groups(groups, {"number": np.arange(3)})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": 0.5}, "alpha: dpo has none"),
        ({"kind": "infonca", "desirable_weight": 2.0}, "desirable_weight: infonca has none"),
        ({"kind": "kto_unpaired", "gamma": 1.0}, "kto_unpaired has neither"),
        ({"offline_share": 0.5}, "offline: names no files"),
        ({"offline": [{"path": "a.jsonl", "held_out": 3}]}, "held_out: nothing is measured"),
        ({"offline": ["a.jsonl"], "offline_share": 1.0}, "less than 1"),
        ({"samples": 1, "temperatures": [1.0]}, "at least 2 answers to compare"),
        ({"second.best_of": 4}, "the second agent answers nothing"),
        ({"second.samples": 1, "second.model": "m", "second.iterations_back": 1}, "one of them"),
        ({"second.samples": 1, "sampling.server": "http://x", "iterations": 1}, "second: a server"),
    ],
)
def test_settings_that_mean_nothing_are_refused(pocket, settings, named):
    with pytest.raises(ValidationError, match=named):
        online(pocket, **settings)


def test_a_second_agent_that_cannot_be_read_is_refused(pocket):
    settings = online(pocket, **{"second.samples": 1, "second.model": pocket.helpfulness})
    with pytest.raises(InputError, match="found a reward model"):
        dpo.open_inputs(settings)


def test_bad_comparisons_end_a_run_before_it_begins(pocket, tmp_path):
    path = tmp_path / "bad.jsonl"
    write(path, problem.comparisons("helpfulness", problem.TRAINING[:3], 0))
    path.write_text(path.read_text() + '{"prompt": []}\n')
    lines = len(path.read_text().splitlines())
    for settings in (online(pocket, offline=[path]), from_files(pocket, data=[path])):
        stage = dpo if isinstance(settings, dpo.DpoRecipe) else offline
        with pytest.raises(InputError, match=f"bad.jsonl:{lines}"):
            stage.open_inputs(settings)
